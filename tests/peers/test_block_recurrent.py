"""Block-Recurrent Transformers against block-recurrent-transformer-pytorch 0.4.4: blocks, segments, batches, its own files.

Its requirements ask for a search library that it does not use: `pip install --no-deps` it, with beartype and einops.
"""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.engine.continuation import begin
from marlin_cli.engine.generation import Stopping, generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.models import build

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
package = pytest.importorskip("block_recurrent_transformer_pytorch", reason="pip install --no-deps, see above")

pytestmark = pytest.mark.peers

TOLERANCE = 1e-5
BLOCK, SEGMENT = 8, 16
TINY = {
    "num_tokens": 256, "dim": 32, "depth": 4, "dim_head": 16, "heads": 2, "max_seq_len": SEGMENT, "block_width": BLOCK,
    "num_state_vectors": 6,
}  # fmt: skip
KINDS = {
    "the middle layer": {},
    "two layers": {"recurrent_layers": (2, 4)},
    "all normed": {"recurrent_layers": (3,), "all_layers_qk_rmsnorm": True},
    "as many states as bytes": {"num_state_vectors": BLOCK},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def both(request, tmp_path):
    torch.manual_seed(0)
    model = package.BlockRecurrentTransformer(**TINY | request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    torch.save(package.RecurrentTrainerWrapper(model).state_dict(), tmp_path / "model.pt")
    read = read_checkpoint(tmp_path / "model.pt", ImportOptions(block_bytes=BLOCK, bos_byte=0))
    return model, build(read.config, read.weights, where="here", dtype=mx.float32)


@torch.no_grad()
def logits_of(model, ids):
    """Segment after segment, memories and states handed on."""
    memories, states, found = [], [], []
    for start in range(0, ids.shape[1], SEGMENT):
        logits, memories, states = model(
            torch.from_numpy(ids[:, start : start + SEGMENT]), xl_memories=memories or [], states=states or []
        )
        found.append(logits.numpy())
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 5 * BLOCK + 3])
def test_blocks_and_segments(both, length):
    model, network = both
    ids = np.random.default_rng(length).integers(0, 256, (3, length))
    assert np.abs(np.array(network(mx.array(ids))) - logits_of(model, ids)).max() < TOLERANCE


def test_cached_decoding(both):
    model, network = both
    ids = np.random.default_rng(0).integers(0, 256, (2, 4 * BLOCK + 5))
    expected = logits_of(model, ids)
    state = begin(network, [bytes(row[:3].tolist()) for row in ids])
    for position in range(3, ids.shape[1]):
        assert np.abs(np.array(state.logits) - expected[:, position - 1]).max() < TOLERANCE, position
        state.push(mx.array(ids[:, position]))


def test_greedy_bytes(both):
    model, network = both
    prompts = [b"a", b"hello wo", b"of another length"]
    found = [b""] * len(prompts)
    for piece in generate(network, prompts, Stopping(3 * BLOCK), Sampling()):
        found[piece.stream] += piece.data
    for prompt, data in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(3 * BLOCK):
            ids.append(int(logits_of(model, np.array([ids]))[0, -1].argmax()))
        assert data == bytes(ids[len(prompt) :])
