"""Files of states: what is not as it was written, or another model's, is refused, and the prompt is read as usual."""

import os
import stat
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engine.state_cases import PROMPT, SHIFTED
from engine.state_mutations import header_of, mutated, with_header
from small_networks import PACKABLE, random_weights

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.fingerprints import fingerprint_of
from marlin_cli.engine.generation import Stopping, generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.state_files import ForeignStateError, StateError, StateFile, read_ids, read_state, write_state
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.errors import OutputError
from marlin_cli.models.megabyte_config import MegaByteConfig


def generated(network, prompt, keeper=None, bits=None):
    return b"".join(piece.data for piece in generate(network, [prompt], Stopping(12), Sampling(), bits, keeper=keeper))


@pytest.fixture(scope="module")
def network():
    return random_weights(MegaByteConfig(**PACKABLE))


@pytest.fixture(scope="module")
def kind(network):
    return kind_of(network)


@pytest.fixture
def file(network, kind, tmp_path):
    path = tmp_path / "state"
    keeper = StateFile(kind, save=path)
    generated(network, PROMPT, keeper)
    return path


def others(tmp_path):
    """Whole files of another model, of other bits and another format."""
    found = []
    for config, seed, bits in (
        (MegaByteConfig(**PACKABLE), 1, CacheBits()),  # another model of the same shape
        (MegaByteConfig(**PACKABLE), 0, CacheBits(8, 8)),
        (MegaByteConfig(**PACKABLE), 0, CacheBits(4, 4)),
        (MegaByteConfig(**{**PACKABLE, "patch_size": 8}), 0, CacheBits()),
        (SHIFTED, 0, CacheBits()),
    ):
        network, path = random_weights(config, seed), tmp_path / "other"
        generated(network, PROMPT, StateFile(kind_of(network, bits), save=path), bits)
        found.append(path.read_bytes())
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"weight": mx.zeros((3,))})
    return [*found, (tmp_path / "weights.safetensors").read_bytes()]


@pytest.mark.parametrize(("config", "bits"), [(MegaByteConfig(**PACKABLE), CacheBits()), (SHIFTED, CacheBits(4, 4))])
def test_three_hundred_files_that_are_not_as_they_were_written_change_nothing(config, bits, tmp_path, capfd):
    """Each means the bytes of ordinary reading, and one line that names the file."""
    network, path = random_weights(config), tmp_path / "state"
    kind = kind_of(network, bits)
    expected = generated(network, PROMPT, StateFile(kind, save=path), bits)
    seen = 0
    for name, data in mutated(path.read_bytes(), others(tmp_path), 330, seed=1):
        path.write_bytes(data)
        keeper = StateFile(kind, load=path)
        assert generated(network, PROMPT, keeper, bits) == expected, name
        assert keeper.ids_restored == 0, name
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith(f"{path}: ") and said[0].endswith("the prompt is read as usual"), (
            name,
            said,
        )
        seen += 1
    assert seen >= 300


def test_every_flipped_byte_of_a_header_is_seen(network, kind, file, tmp_path):
    whole = file.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    for at in range(0, size, 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(StateError):
            read_state(file, kind)


def test_what_was_written_is_read(network, kind, file, capfd):
    keeper = StateFile(kind, load=file)
    assert generated(network, PROMPT, keeper) == generated(network, PROMPT)
    assert keeper.ids_restored == len(PROMPT)
    assert bytes(read_ids(file, kind).astype(np.uint8)) == PROMPT
    assert capfd.readouterr().err == ""
    metadata = header_of(file.read_bytes())[0]["__metadata__"]
    assert metadata["format"] == "marlin state" and metadata["version"] == "1" and metadata["prompt_ids"] == str(len(PROMPT))
    assert metadata["model"] == fingerprint_of(network) and metadata["patch_size"] == "4"


def test_only_its_owner_may_read_the_prompt_in_a_file(file):
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ("version", "is a state of version 'x', and this marlin reads version 1"),
        ("model", "the state of another model"),
        ("arithmetic", "the state of another arithmetic"),
        ("key_bits", "the state of another key_bits"),
        ("dtype", "the state of another dtype"),
        ("patch_size", "the state of another patch_size"),
        ("layout", "the state of another layout"),
        ("marlin", "the state of another marlin"),
    ],
)
def test_what_another_run_would_compute_otherwise_is_told(kind, file, fact, message):
    header, body = header_of(file.read_bytes())
    header["__metadata__"][fact] = "x"
    file.write_bytes(with_header(header, body))
    for read in (read_state, read_ids):
        with pytest.raises(ForeignStateError, match=message):
            read(file, kind)


def test_a_file_that_lies_of_itself_with_a_sum_that_fits_is_not_taken(network, kind, file):
    """Whoever writes a state by hand writes its sum too: what it holds is looked at all the same."""
    state = read_state(file, kind)
    shorter = replace(state, places=(replace(state.places[0], units=3),))
    write_state(file, shorter, kind)
    with pytest.raises(StateError, match="ids or places"):
        read_state(file, kind)
    write_state(file, replace(state, ids=-state.ids), kind)
    with pytest.raises(StateError, match="ids or places"):
        read_state(file, kind)
    write_state(file, replace(state, ids=state.ids[:-4]), kind)
    with pytest.raises(StateError, match="'0.keys' is not as this model has it"):
        read_state(file, kind)


def test_a_missing_file_is_told_and_the_prompt_is_read(network, kind, tmp_path, capfd):
    assert generated(network, PROMPT, StateFile(kind, load=tmp_path / "none")) == generated(network, PROMPT)
    assert capfd.readouterr().err == f"{tmp_path / 'none'}: no such file; the prompt is read as usual\n"


def test_a_pipe_is_not_waited_for(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateError, match="is a pipe"):
        read_state(tmp_path / "pipe", kind)


def test_the_state_of_another_prompt_is_told(network, kind, file, capfd):
    assert generated(network, b"other" + PROMPT, StateFile(kind, load=file)) == generated(network, b"other" + PROMPT)
    assert "the state of another prompt, which begins otherwise; this one is read as usual" in capfd.readouterr().err


def test_one_file_to_read_and_write_grows_with_the_prompt_and_is_left_alone_otherwise(network, kind, file):
    before = file.stat().st_ino
    generated(network, PROMPT[:40], StateFile(kind, file, file))
    assert file.stat().st_ino == before
    generated(network, PROMPT + b"more", StateFile(kind, file, file))
    assert file.stat().st_ino != before and len(read_ids(file, kind)) == len(PROMPT) + 4


def test_a_state_that_cannot_be_written_says_so(network, kind, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        generated(network, PROMPT, StateFile(kind, save=tmp_path / "no folder" / "state"))
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_is_of_names_shapes_types_and_values(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    seen = {fingerprint_of(network)}
    for name, change in {
        "one bit": lambda weight: weight + mx.zeros_like(weight).at[0, 0].add(1e-6),
        "type": lambda weight: weight.astype(mx.bfloat16),
        "order": lambda weight: weight[::-1],
    }.items():
        other = random_network(MegaByteConfig(**small_sizes))
        assert fingerprint_of(other) in seen or len(seen) == 3
        other.output.weight = change(other.output.weight)
        assert fingerprint_of(other) not in seen, name
        seen.add(fingerprint_of(other))
    windowed = random_network(MegaByteConfig(**small_sizes, attention_window=5))
    assert fingerprint_of(windowed) not in seen
