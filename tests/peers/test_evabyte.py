"""EvaByte against a transcription of its authors' code: windows, ragged lengths, cached decoding, greedy bytes."""

import json

import mlx.core as mx
import numpy as np
import pytest
from evabyte_cases import SIZES, evabyte_folder, random_evabyte, tensors_of

from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.engine.continuation import begin
from marlin_cli.engine.generation import Stopping, generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.models import build

torch = pytest.importorskip("torch", reason="needs the extra `peers`")

from torch_evabyte import TorchEvaByte  # noqa: E402 (it needs torch)

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
WINDOW = SIZES["window_bytes"]
KINDS = {
    "as released": {},
    "one head, gains as they are": {"prediction_heads": 1, "norm_add_unit_offset": False},
    "a chunk a window": {"chunk_bytes": WINDOW},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def both(request, tmp_path):
    of_config = {name: value for name, value in request.param.items() if name in SIZES}
    rest = {name: value for name, value in request.param.items() if name not in SIZES}
    network = random_evabyte(**of_config)
    folder = evabyte_folder(tmp_path / "model", network, **rest)
    document = json.loads((folder / "config.json").read_text())
    tensors = tensors_of(network, document["norm_add_unit_offset"])
    read = read_checkpoint(folder)
    ours = build(read.config, read.weights, where="here", dtype=mx.float32)
    return TorchEvaByte(document, {name: torch.from_numpy(each) for name, each in tensors.items()}), ours


@pytest.mark.parametrize("length", [1, 7, 8, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 13, 3 * WINDOW + 5])
def test_windows_and_all_heads(both, length):
    model, network = both
    ids = np.random.default_rng(length).integers(64, 320, (2, length))
    expected = model(torch.from_numpy(ids)).numpy()
    hidden = network.decode(mx.array(ids))
    assert np.abs(np.array(network.head(hidden)) - expected[:, :, 0]).max() < TOLERANCE
    if network.config.prediction_heads > 1:
        assert np.abs(np.array(network.further(hidden)) - expected[:, :, 1:]).max() < TOLERANCE


def test_cached_decoding(both):
    model, network = both
    data = np.random.default_rng(0).integers(0, 256, (2, 3 * WINDOW + 5))
    expected = model(torch.from_numpy(np.pad(data + 64, [(0, 0), (1, 0)], constant_values=1))).numpy()[:, :, 0]
    state = begin(network, [bytes(row[:3].tolist()) for row in data])
    for position in range(3, data.shape[1] + 1):
        assert np.abs(np.array(state.logits) - expected[:, position]).max() < TOLERANCE, position
        if position < data.shape[1]:
            state.push(mx.array(data[:, position] + 64))


def test_greedy_bytes(both):
    model, network = both
    prompts = [b"", b"hello wo", b"x" * (2 * WINDOW - 3)]
    found = [b""] * len(prompts)
    for piece in generate(network, prompts, Stopping(WINDOW + 4), Sampling()):
        found[piece.stream] += piece.data
    for prompt, data in zip(prompts, found, strict=True):
        ids = [1, *(byte + 64 for byte in prompt)]
        for _ in range(WINDOW + 4):
            ids.append(int(model(torch.tensor([ids]))[0, -1, 0].argmax()))
            if ids[-1] in network.config.end_ids:
                break
        assert data == bytes(value - 64 for value in ids[1 + len(prompt) :] if value >= 64)
