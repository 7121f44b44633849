"""Prompts kept for a server: the longest beginning wins, budgets hold, and a folder may have two owners."""

import os
import threading

import mlx.core as mx
import numpy as np
import pytest
from engine.state_cases import PROMPT
from small_networks import PACKABLE, random_weights

from marlin_cli.engine.generation import Stopping, generate
from marlin_cli.engine.prompt_store import PromptStore, StoreLimits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.state_files import read_ids
from marlin_cli.engine.state_folder import SUFFIX
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.engine.states import ArrayRows, Place, StreamState, Units, ids_of
from marlin_cli.errors import OutputError
from marlin_cli.models.megabyte_config import MegaByteConfig

CONFIG = MegaByteConfig(**{**PACKABLE, "max_bytes": 512})
ANY = StoreLimits(fewest_rows=2)


@pytest.fixture(scope="module")
def network():
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def kind(network):
    return kind_of(network)


@pytest.fixture
def stores():
    """Makes stores that are closed in the end."""
    made = []

    def make(*arguments):
        made.append(PromptStore(*arguments))
        return made[-1]

    yield make
    for store in made:
        store.close()


def generated(network, prompt, keeper=None, most=1):
    """What follows a prompt; a single byte leaves the state that of the prompt alone."""
    return b"".join(piece.data for piece in generate(network, [prompt], Stopping(most), Sampling(), keeper=keeper))


def units_in(store, prompt):
    found = store.restore(prompt)
    return None if found is None else found.units


def state(text, kind, size=100):
    """A state of `size` bytes and a little more that stands for a text and holds nothing."""
    count = len(text) // 4
    rows = ArrayRows([([mx.zeros((1, 1, count + 1, size), dtype=mx.uint8)], [])], count + 1)
    return StreamState(ids_of(text), Units(4), rows, (Place(count, mx.zeros((1,))),))


def test_a_prompt_begins_where_the_longest_kept_one_ends(network, kind, stores):
    store = stores(kind, None, ANY)
    for prompt in (PROMPT[:20], PROMPT[:40] + b"one thing", PROMPT[:60] + b"another"):
        generated(network, prompt, store)
    assert units_in(store, PROMPT) == 15
    assert units_in(store, PROMPT[:40] + b"one more thing") == 11  # "one " is the eleventh patch of both
    assert units_in(store, b"?" + PROMPT) is None
    assert generated(network, PROMPT + b"!", store, 12) == generated(network, PROMPT + b"!", None, 12)


def test_what_followed_a_prompt_is_a_part_of_the_next_one(network, kind, stores):
    store = stores(kind, None, ANY)
    first = generated(network, PROMPT, store, most=30)
    following = PROMPT + first + b" and then?"
    assert units_in(store, following) >= (len(PROMPT) + len(first)) // 4 - 1
    assert generated(network, following, store, most=30) == generated(network, following, most=30)
    assert len(store._memory._states) == 1


def test_memory_is_bounded_and_what_was_used_longest_ago_goes_first(kind, stores):
    store = stores(kind, None, StoreLimits(memory_bytes=3 * 350, fewest_rows=1))
    for text in (b"aaaaaaaa", b"bbbbbbbb", b"cccccccc"):
        store.keep(state(text, kind))
    assert store.memory_bytes == 3 * (300 + 4)
    assert units_in(store, b"aaaaaaaa") == 2  # used now, so b is the oldest
    store.keep(state(b"dddddddd", kind))
    assert [units_in(store, text * 8) for text in (b"a", b"b", b"c", b"d")] == [2, None, 2, 2]
    store.keep(state(b"eeee" * 100, kind))  # larger than the budget
    assert store.memory_bytes == 0 and units_in(store, b"dddddddd") is None


def test_what_a_longer_state_holds_is_held_once(network, kind, stores):
    store = stores(kind, None, ANY)
    generated(network, PROMPT[:40], store)
    generated(network, PROMPT, store)
    assert len(store._memory._states) == 1
    before = store.memory_bytes
    generated(network, PROMPT[:20], store)
    assert store.memory_bytes == before and len(store._memory._states) == 1


def test_shared_pages_count_once(network, kind, stores):
    store = stores(kind, None, ANY)
    long = bytes(range(256)) * 2  # 128 patches: a whole page and one row
    generated(network, long[:508] + b"1234", store)
    alone = store.memory_bytes
    generated(network, long[:508] + b"5678", store)
    assert len(store._memory._states) == 2
    assert store.memory_bytes < 2 * alone
    for number in list(store._memory._states):
        store._memory._remove(number)
    assert store.memory_bytes == 0 and not store._memory._held


def test_short_prompts_are_not_kept(network, kind, stores, tmp_path):
    store = stores(kind, tmp_path / "states")
    generated(network, PROMPT[:40], store)
    store.close()
    assert store.restore(PROMPT[:40]) is None and files(tmp_path / "states") == []


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_another_process_starts_from_the_folder(network, kind, tmp_path):
    folder = tmp_path / "states"
    first = PromptStore(kind, folder, ANY)
    generated(network, PROMPT, first)
    first.close()
    assert folder.stat().st_mode & 0o777 == 0o700
    (name,) = files(folder)
    assert name.endswith(SUFFIX) and bytes(read_ids(folder / name, kind).astype(np.uint8)) == PROMPT
    second = PromptStore(kind, folder, ANY)
    assert units_in(second, PROMPT[:50]) == 11
    assert generated(network, PROMPT + b"more", second, 12) == generated(network, PROMPT + b"more", None, 12)
    second.close()
    assert len(files(folder)) == 2 and name in files(folder)  # it did not know that the first is a part of its own


def test_a_longer_state_takes_the_place_of_its_files(network, kind, stores, tmp_path):
    store = stores(kind, tmp_path, ANY)
    for end in (40, 56, 72):
        generated(network, PROMPT[:end], store)
    store.close()
    (name,) = files(tmp_path)
    assert len(read_ids(tmp_path / name, kind)) == 72


def test_files_are_bounded_and_what_was_used_longest_ago_goes_first(network, kind, stores, tmp_path):
    prompts = [bytes([65 + number]) * 64 for number in range(4)]
    store = stores(kind, tmp_path, ANY)
    generated(network, prompts[0], store)
    store.close()
    size = next(tmp_path.iterdir()).stat().st_size
    os.utime(next(tmp_path.iterdir()), (1, 1))
    store = stores(kind, tmp_path, StoreLimits(memory_bytes=0, disk_bytes=3 * size, fewest_rows=2))
    assert units_in(store, prompts[0]) == 16  # used now
    for number in (1, 2, 3):
        generated(network, prompts[number], store)
    store.close()
    left = [bytes(read_ids(path, kind).astype(np.uint8)) for path in tmp_path.iterdir()]
    assert len(left) == 3 and prompts[3] in left


def test_a_damaged_file_is_told_removed_and_read_around(network, kind, stores, tmp_path, capfd):
    store = stores(kind, tmp_path, ANY)
    generated(network, PROMPT[:40] + b"much else", store)
    generated(network, PROMPT, store)
    store.close()
    longest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(longest.read_bytes())
    data[-100] ^= 1
    longest.write_bytes(data)
    store = stores(kind, tmp_path, ANY)
    capfd.readouterr()
    assert units_in(store, PROMPT) == 10  # from the other file
    said = capfd.readouterr().err
    assert (
        said
        == f"{longest}: is damaged: its bytes are not those that were written; it is removed, and prompts are read as usual\n"
    )
    assert not longest.exists()
    cut = next(tmp_path.iterdir())
    cut.write_bytes(cut.read_bytes()[:200])
    store = stores(kind, tmp_path, ANY)
    assert store.restore(PROMPT) is None
    said = capfd.readouterr().err
    assert said.startswith(f"{cut}: damaged safetensors file") and said.count("\n") == 1 and files(tmp_path) == []


def test_files_of_other_models_and_others_files_are_left_alone(network, kind, stores, tmp_path, capfd):
    other = random_weights(CONFIG, seed=5)
    store = stores(kind_of(other), tmp_path, ANY)
    generated(other, PROMPT, store)
    store.close()
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    store = stores(kind, tmp_path, ANY)
    assert store.restore(PROMPT) is None and files(tmp_path) == before and capfd.readouterr().err == ""


def test_a_file_that_goes_while_it_is_wanted_is_no_error(network, kind, stores, tmp_path, capfd):
    store = stores(kind, tmp_path, ANY)
    generated(network, PROMPT, store)
    store.close()
    late = stores(kind, tmp_path, ANY)
    late._folder._look()
    for path in tmp_path.iterdir():
        path.unlink()
    late._folder._look = lambda: None
    assert late.restore(PROMPT) is None and capfd.readouterr().err == ""


def test_what_a_killed_writer_left_is_removed(kind, stores, tmp_path):
    left = tmp_path / f".abc{SUFFIX}.12345678.unfinished.safetensors"
    left.write_bytes(b"half")
    (tmp_path / ".mine.unfinished.safetensors").write_bytes(b"")
    stores(kind, tmp_path)
    assert files(tmp_path) == [".mine.unfinished.safetensors"]


def test_a_folder_that_others_may_write_in_is_refused(kind, tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(OutputError, match=f"{tmp_path} can be written by everybody; chmod go-w it"):
        PromptStore(kind, tmp_path)
    tmp_path.chmod(0o700)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file: cannot write"):
        PromptStore(kind, tmp_path / "file")


def test_a_full_disk_is_told_once_and_memory_goes_on(network, kind, tmp_path, monkeypatch, capfd):
    def full(path, state, kind):
        raise OutputError(f"{path.name}: cannot write: No space left on device")

    monkeypatch.setattr("marlin_cli.engine.state_folder.write_state", full)
    store = PromptStore(kind, tmp_path, ANY)
    generated(network, PROMPT, store)
    generated(network, b"?" + PROMPT, store)
    store.close()
    said = capfd.readouterr().err
    assert (
        said.endswith(": cannot write: No space left on device; the prompt is kept in memory alone\n") and said.count("\n") == 1
    )
    assert units_in(store, PROMPT) == 18


def test_two_stores_on_one_folder_agree(network, kind, tmp_path):
    """Both write and evict at once, on a budget of two files; whatever they find gives the bytes of ordinary reading."""
    prompts = [bytes([65 + number]) * 64 for number in range(5)]
    expected = {prompt: generated(network, prompt + b"..") for prompt in prompts}
    probe = PromptStore(kind, tmp_path, ANY)
    generated(network, prompts[0], probe)
    probe.close()
    limits = StoreLimits(memory_bytes=0, disk_bytes=2 * next(tmp_path.iterdir()).stat().st_size, fewest_rows=2)
    both = [PromptStore(kind, tmp_path, limits) for _ in range(2)]
    found = 0
    for turn in range(12):
        prompt, store = prompts[turn * 3 % 5], both[turn % 2]
        found += store.restore(prompt + b"..") is not None
        assert generated(network, prompt + b"..", store) == expected[prompt]
    for store in both:
        store.close()
    assert found and len(files(tmp_path)) <= 2


def test_the_folder_is_written_by_a_thread_of_its_own(network, kind, tmp_path, monkeypatch):
    seen, going = [], threading.Event()

    def slow(path, state, kind):
        going.wait(10)
        seen.append(threading.current_thread().name)

    monkeypatch.setattr("marlin_cli.engine.state_folder.write_state", slow)
    store = PromptStore(kind, tmp_path, ANY)
    for number in range(9):
        generated(network, bytes([65 + number]) * 64, store)  # more than may wait: the others are not written
    going.set()
    store.close()
    assert 4 <= len(seen) <= 6 and {*seen} == {"prompt store"}


def test_what_is_no_file_in_the_folder_is_left_alone(network, kind, stores, tmp_path, capfd):
    store = stores(kind, tmp_path, ANY)
    generated(network, PROMPT, store)
    store.close()
    (tmp_path / f"folder{SUFFIX}").mkdir()
    os.mkfifo(tmp_path / f"pipe{SUFFIX}")
    (tmp_path / f"nowhere{SUFFIX}").symlink_to(tmp_path / "nothing")
    (tmp_path / f"zero{SUFFIX}").symlink_to("/dev/zero")
    before = files(tmp_path)
    store = stores(kind, tmp_path, StoreLimits(memory_bytes=0, disk_bytes=1, fewest_rows=2))
    assert units_in(store, PROMPT) == 18 and files(tmp_path) == before
    generated(network, b"?" + PROMPT, store)  # too much for the folder: what can go does
    store.close()
    assert files(tmp_path) == [name for name in before if name.split(".")[0] in ("folder", "pipe", "nowhere", "zero")]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("call", ["unlink", "utime"])
def test_a_folder_that_takes_no_changes_is_read_all_the_same(call, network, kind, stores, tmp_path, monkeypatch, capfd):
    store = stores(kind, tmp_path, ANY)
    generated(network, PROMPT, store)
    store.close()
    damaged = tmp_path / f"damaged{SUFFIX}"
    damaged.write_bytes(b"??")

    def refuses(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, call, refuses)
    store = stores(kind, tmp_path, ANY)
    assert [units_in(store, PROMPT) for _ in range(2)] == [18, 18]
    said = capfd.readouterr().err
    assert said.startswith(f"{damaged}: ") and said.count("\n") == 1
    assert ("it cannot be removed (Read-only file system)" in said) == damaged.exists() == (call == "unlink")


def test_a_folder_that_takes_no_stamps_is_told_once_and_written_on(network, kind, stores, tmp_path, monkeypatch, capfd):
    store = stores(kind, tmp_path, StoreLimits(memory_bytes=0, fewest_rows=2))
    utime, refused = os.utime, []

    def refuses(path, *given):
        if os.path.exists(path):
            refused.append(path)
            raise PermissionError(1, "Operation not permitted")
        utime(path, *given)

    monkeypatch.setattr(os, "utime", refuses)
    monkeypatch.setattr(store._memory, "beginning_of", lambda ids: None)
    for prompt in (PROMPT, PROMPT, PROMPT[::-1]):
        generated(network, prompt, store)
    store.close()
    assert refused and len(files(tmp_path)) == 2
    assert capfd.readouterr().err == f"{tmp_path}: Operation not permitted; files of prompts are not kept as they should be\n"


def test_what_a_prompt_needs_is_read_in_another_thread(network, kind, stores, tmp_path, monkeypatch):
    store = stores(kind, tmp_path, ANY)
    generated(network, PROMPT, store)
    store.close()
    store, threads, going = stores(kind, tmp_path, ANY), [], threading.Event()
    find = store._folder.find

    def slow(*given):
        threads.append(threading.current_thread())
        assert going.wait(10)
        return find(*given)

    monkeypatch.setattr(store._folder, "find", slow)
    assert not store.is_ready(PROMPT) and not store.is_ready(PROMPT)
    going.set()
    assert store.restore(PROMPT).units == 18 and len(threads) == 1 and threads[0] is not threading.main_thread()
    assert store.restore(PROMPT).units == 18 and threads[1] is threading.main_thread()  # nobody was asked before
    assert not store.is_ready(b"?" + PROMPT) or threads[2]  # another prompt is looked for anew
    assert store.restore(b"?" + PROMPT) is None and len(threads) == 3
