"""SpaceByte against its torch transcription: the same logits for every option, the same bytes."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli import load

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
from torch_spacebyte import TorchSpaceByte, TorchSpaceConfig  # noqa: E402 (needs torch)

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
DATA = ("Bytes, é 東\x00 [and] more_of them;  0x9 " * 4).encode()[:120]
TEXTS = [DATA, DATA[::-1], bytes(range(64, 184)), b"a" * 120, b"\xff \xff. " * 24]
OPTIONS = {
    "defaults": {},
    "rope": {"rope": True},
    "unnormalised queries": {"qk_layer_norm": False},
    "muTransfer": {"qk_layer_norm": False, "init": "muTransfer"},
    "GELU": {"nonlinear": "GELU"},
    "SiLU, RMSNorm": {"nonlinear": "SiLU", "layer_norm": "RMSNorm"},
    "grouped attention": {"attention_groups": 2},
    "a window of patches": {"attention_window": 3},
    "a window of one byte": {"local_attention_window": 1},
    "no initial blocks": {"n_initial_layers": 0},
    "no final blocks": {"n_initial_layers": 2},
    "as wide as patches": {"d_local": 64},
    "periodic": {"patch_method": "periodic", "global_context_size": 16},
    "little room": {"global_context_size": 7, "rope": True},
    "tied": {"tie_embedding": True},
    "tied, muTransfer": {"tie_embedding": True, "init": "muTransfer"},
    "another BOS": {"vocab_size": 300, "BOS": 299},
}


def make(options):
    """A model with random weights, norms included."""
    torch.manual_seed(0)
    model = TorchSpaceByte(TorchSpaceConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.normal_(1.0, 0.3)
    return model


@torch.no_grad()
def their_logits(model, texts):
    """Logits [n, length + 1, vocab] of what follows the BOS and each byte."""
    return model(torch.tensor([[model.config.BOS, *text] for text in texts])).numpy()


@pytest.mark.parametrize("name", OPTIONS)
def test_logits(name, tmp_path):
    model = make(OPTIONS[name])
    torch.save(model.checkpoint(), tmp_path / "ckpt.pt")
    network = load(tmp_path / "ckpt.pt", device="cpu").network
    theirs = their_logits(model, TEXTS)
    assert np.abs(theirs).max() > 0.5
    together = network(network.led(mx.array([list(text) for text in TEXTS])))
    assert np.abs(np.array(together) - theirs).max() < TOLERANCE
    for length in (0, 1, 17):
        alone = network(network.led(mx.array([list(DATA[:length])], dtype=mx.int32)))
        assert np.abs(np.array(alone)[0] - theirs[0, : length + 1]).max() < TOLERANCE


@pytest.mark.parametrize("name", ["defaults", "rope", "periodic", "a window of patches"])
def test_greedy_bytes(name, tmp_path):
    model = make(OPTIONS[name])
    torch.save(model.checkpoint(), tmp_path / "ckpt.pt")
    found, data = load(tmp_path / "ckpt.pt", device="cpu").generate(DATA[:40], 48), DATA[:40]
    for _ in range(48):
        following = int(their_logits(model, [data])[0, -1].argmax())
        if following == model.config.BOS:  # which ends a text
            break
        data += bytes([following])
    assert found == data[40:]
