"""The paper's layout against its torch transcription: the same logits, the same bytes, for every option."""

import numpy as np
import pytest

from marlin_cli import load
from marlin_cli.checkpoints import ImportOptions

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
from paper_megabyte import PaperConfig, PaperMegaByte  # noqa: E402 (needs torch)

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
LENGTHS = (1, 7, 8, 9, 100)
GREEDY_BYTES = 256
PROMPT_BYTES = (0, 1, 7, 8, 9, 100)
CONTEXT_BYTES = 384
BASE = {
    "patch_size": 8,
    "context_size": CONTEXT_BYTES,
    "d_model": 96,
    "d_local": 32,
    "n_layers": 2,
    "n_local_layers": 2,
}
OPTIONS = {
    "defaults": {},
    "rope": {"rope": True},
    "no pads": {"use_padding": False},
    "unnormalised queries": {"qk_layer_norm": False},
    "muTransfer": {"qk_layer_norm": False, "init": "muTransfer"},
    "muTransfer, normalised queries": {"init": "muTransfer"},
    "GELU": {"nonlinear": "GELU"},
    "SiLU, RMSNorm": {"nonlinear": "SiLU", "layer_norm": "RMSNorm"},
    "grouped attention": {"attention_groups": 2},
    "a window": {"attention_window": 3},
    "more ids than bytes": {"vocab_size": 300, "BOS": 299},
    "narrow feed-forward, another BOS": {"d_ff_mult": 2, "BOS": 0, "use_padding": False},
    "many at once": {
        "attention_groups": 1, "rope": True, "use_padding": False, "attention_window": 2, "layer_norm": "RMSNorm",
    },
}  # fmt: skip


def make(options):
    """A model with random weights, norms included."""
    torch.manual_seed(0)
    model = PaperMegaByte(PaperConfig(**BASE, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.normal_(1.0, 0.3)
    return model


@torch.no_grad()
def their_logits(model, data):
    """Logits of each byte of `data` and of the one that follows: [len(data) + 1, vocab]."""
    patch = model.config.patch_size
    padded = list(data) + [0] * (patch - len(data) % patch)
    return model(torch.tensor([padded]))[0, : len(data) + 1].numpy()


def random_bytes(count):
    return np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("name", OPTIONS)
def test_logits(name, tmp_path):
    model = make(OPTIONS[name])
    torch.save(model.checkpoint(), tmp_path / "ckpt.pt")
    ours = load(tmp_path / "ckpt.pt", device="cpu")
    for length in LENGTHS:
        data = random_bytes(length)
        theirs = their_logits(model, data)[:-1]
        assert np.abs(theirs).max() > 0.5
        assert np.abs(np.array(ours.logits(data)) - theirs).max() < TOLERANCE


def test_a_bare_state_dict_with_options(tmp_path):
    options = {
        "nonlinear": "GELU",
        "layer_norm": "RMSNorm",
        "rope": True,
        "attention_window": 3,
        "qk_layer_norm": False,
    }
    model = make(options)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    told = {"activation": "gelu_tanh", "norm": "variance", "rope": True, "attention_window": 3, "attention_scale": 0.25}
    given = ImportOptions(head_dim=16, **told)
    ours = load(tmp_path / "model.pt", device="cpu", options=given)
    data = random_bytes(100)
    assert np.abs(np.array(ours.logits(data)) - their_logits(model, data)[:-1]).max() < TOLERANCE
    # Heads say the width of a head as well.
    by_heads = ImportOptions(heads=6, **told)
    again = load(tmp_path / "model.pt", device="cpu", options=by_heads)
    assert again.config == ours.config


@pytest.mark.parametrize("name", ["defaults", "many at once"])
@pytest.mark.parametrize("prompt_bytes", PROMPT_BYTES)
def test_greedy_bytes(name, prompt_bytes, tmp_path):
    model = make(OPTIONS[name])
    torch.save(model.checkpoint(), tmp_path / "ckpt.pt")
    ours = load(tmp_path / "ckpt.pt", device="cpu")
    prompt = random_bytes(prompt_bytes)
    expected = list(prompt)
    for _ in range(GREEDY_BYTES):
        expected.append(int(their_logits(model, expected)[-1].argmax()))
    assert ours.generate(prompt, max_bytes=GREEDY_BYTES, temperature=0.0) == bytes(expected[prompt_bytes:])
