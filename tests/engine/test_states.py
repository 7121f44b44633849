"""A prompt that goes on from a kept state gives the very numbers that reading all of it gives, in every layout and format."""

import mlx.core as mx
import numpy as np
import pytest
from engine.state_cases import CASES, OTHERS, PROMPT, Keeper
from small_networks import CONTINUING

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.generation import Stopping, generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.state_files import read_state, write_state
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.engine.states import ArrayRows, KernelRows, Place, StreamState, Units, ids_of
from marlin_cli.errors import UsageError
from marlin_cli.models import continuing_of
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu

MODULE = cpu.kernels()[0]


@pytest.fixture(autouse=True)
def exact_rows():
    if MODULE is not None:
        MODULE.set_exact_rows(True)
    yield
    if MODULE is not None:
        MODULE.set_exact_rows(cpu.rows_are_exact())


@pytest.fixture(params=["kernels", "graph"])
def reader(request, monkeypatch):
    if request.param == "graph":
        monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
        for module in ("state_kinds", "byte_decoding", "text_readers"):
            monkeypatch.setattr(f"marlin_cli.engine.{module}.fuse_bygpt5", lambda network: None)
    elif MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.kernels()[1]}")
    return request.param


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, random_network):
    config, bits = request.param
    return random_network(config), bits


def read(network, prompt, bits, keeper=None):
    """The logits after a prompt and after four ids more, the first of which may end a patch."""
    ids = continuing_of(network).ids(network.config, prompt, False)
    state = way_of(network).begin(network, [ids], bits, keeper)
    found = [np.array(state.logits)]
    for _ in range(5):
        state.push(mx.array([70]))
        found.append(np.array(state.logits))
    return np.stack(found)


def assert_alike(reader, found, expected):
    """To the bit by the kernels; MLX's products of one row and of many round otherwise."""
    if reader == "kernels":
        assert np.array_equal(found, expected)
    else:
        assert np.allclose(found, expected, atol=1e-4)


def test_going_on_from_a_state_gives_what_reading_gives(reader, case, tmp_path):
    network, bits = case
    keeper = Keeper()
    read(network, PROMPT, bits, keeper)
    kind = kind_of(network, bits)
    write_state(tmp_path / "state", keeper.kept, kind)
    from_file = read_state(tmp_path / "state", kind)
    for name, other in OTHERS.items():
        expected = read(network, other, bits)
        for state in (keeper.kept, from_file):
            again = Keeper(state)
            assert_alike(reader, read(network, other, bits, again), expected)
            if again.kept is not None and state is from_file:  # what was kept is as it was, whatever was read behind it
                assert_alike(reader, read(network, other, bits, Keeper(again.kept)), expected)
            common = next((n for n in range(len(PROMPT)) if PROMPT[: n + 1] != other[: n + 1]), len(PROMPT))
            whole = kind.units.whole(len(other))
            if common == 0:
                assert again.beginning is None, name
            elif kind.delayed is None:
                assert again.beginning.units >= min(common // kind.units.size, whole) - 1, name
            elif common < len(PROMPT) or whole < kind.units.whole(len(PROMPT)):
                assert again.beginning is None, name  # a shift of tokens is known where reading has paused alone
            else:
                assert again.beginning.units == kind.units.whole(len(PROMPT)), name


def test_pages_are_shared_until_somebody_writes(random_network, small_sizes):
    if MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.kernels()[1]}")
    config = MegaByteConfig(**{**small_sizes, "max_bytes": 2048})
    network, keeper = random_network(config), Keeper()
    prompt = bytes(range(256)) * 4  # 256 patches: two whole pages and the leading row
    read(network, prompt, None, keeper)
    again = Keeper(keeper.kept)
    read(network, prompt + b"more of it", None, again)
    own, others = keeper.kept.rows.memory(), again.kept.rows.memory()
    assert len(own) == len(others) == 2 * 2 * 3
    assert len(own.keys() & others.keys()) == 2 * 2 * 2  # all but the open page of keys and of values of each layer
    assert sum(own.values()) == sum(others.values()) == 2 * 2 * 3 * 128 * config.global_dim * 4


def test_with_a_shift_of_tokens_reading_goes_on_where_it_has_paused(random_network, small_sizes, monkeypatch):
    monkeypatch.setattr("marlin_cli.engine.decoding.PREFILL_ROWS", 4)
    network, keeper = random_network(MegaByteConfig(**small_sizes, token_shift=True)), Keeper()
    read(network, PROMPT, None, keeper)
    assert [place.units for place in keeper.kept.places] == [3, 7, 11, 15, 18]
    other = PROMPT[:50] + b"otherwise"
    again = Keeper(keeper.kept)
    assert np.array_equal(read(network, other, None, again), read(network, other, None)) or MODULE is None
    assert again.beginning.units == 11
    assert [place.units for place in again.kept.places] == [3, 7, 11, 14]


def test_a_state_is_kept_though_nothing_follows(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    for stopping, prompt in ((Stopping(0), PROMPT), (Stopping(5), PROMPT + PROMPT[:24])):
        keeper = Keeper()
        assert [piece.data for piece in generate(network, [prompt], stopping, Sampling(), keeper=keeper)] == [b""]
        assert bytes(keeper.kept.ids.astype(np.uint8)) == prompt


def test_several_prompts_are_read_as_usual(random_network, small_sizes):
    network, keeper = random_network(MegaByteConfig(**small_sizes)), Keeper()
    way_of(network).begin(network, [PROMPT, PROMPT], None, keeper)
    assert keeper.kept is None


def state_of(ids, places, *, anywhere=True, units=None):
    units = units or Units(4)
    rows = ArrayRows([([mx.zeros((1, 1, 1 + len(ids) // units.size, 2))],) * 2], 1 + len(ids) // units.size)
    return StreamState(ids_of(ids), units, rows, tuple(Place(at, mx.zeros((1,))) for at in places), anywhere)


@pytest.mark.parametrize(
    ("ids", "anywhere", "slack", "units", "stands_at_a_place"),
    [
        (b"abcdefghijkl", True, 0, 3, True),
        (b"abcdefghijklm", True, 0, 3, True),
        (b"abcdefghXXXXX", True, 0, 2, False),  # the patch after these is read
        (b"abcdefghX", True, 0, 1, False),  # none is, so the second is read again
        (b"abcdXXXX", True, 0, 1, False),
        (b"abcd", True, 0, None, None),
        (b"abcdefghijkl", True, 1, 1, False),  # the patch that ends a prompt is the finer stages'
        (b"abcdefghijklm", True, 1, 3, True),
        (b"abcdefghijklm", False, 0, 3, True),
        (b"abcdefghXXXX", False, 0, None, None),
        (b"Xbcdefghijkl", True, 0, None, None),
        (b"", True, 0, None, None),
    ],
)
def test_what_of_a_prompt_need_not_be_read(ids, anywhere, slack, units, stands_at_a_place):
    found = state_of(b"abcdefghijkl", [3], anywhere=anywhere, units=Units(4, slack)).beginning_of(ids)
    assert (found and found.units) == units
    if found:
        assert found.count == units + 1
        assert (found.here is not None) == stands_at_a_place


def test_which_state_holds_which():
    long, short, other = state_of(b"abcdefgh", [2]), state_of(b"abcd", [1]), state_of(b"abcdXXXX", [2])
    assert long.holds(short) and long.holds(long) and not short.holds(long) and not long.holds(other)
    shifted = state_of(b"abcdefgh", [2], anywhere=False)
    assert not shifted.holds(short)
    assert state_of(b"abcdefgh", [1, 2], anywhere=False).holds(short)


def test_what_kernels_keep_is_told_by_its_kind(random_network, small_sizes):
    network, keeper = random_network(MegaByteConfig(**small_sizes)), Keeper()
    read(network, PROMPT, CacheBits(), keeper)
    assert isinstance(keeper.kept.rows, KernelRows if MODULE else ArrayRows)


def test_networks_that_remember_otherwise_say_so(random_network):
    others = [config for config in CONTINUING.values() if config.model_type not in ("megabyte", "bygpt5")]
    assert others
    for config in others:
        with pytest.raises(UsageError, match="states of prompts are of a MegaByte or ByGPT5; an? .* reads its prompts anew"):
            kind_of(random_network(config))
