"""MEGABYTE-pytorch with random weights, and what marlin makes of its checkpoints: the same logits, the same bytes."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli import load
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.errors import AssumptionWarning

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
MEGABYTE = pytest.importorskip("MEGABYTE_pytorch", reason="needs the extra `peers`").MEGABYTE

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
LENGTHS = (1, 7, 8, 9, 100)
GREEDY_BYTES = 256
PROMPT_BYTES = (0, 1, 7, 8, 9, 100)

# Options of its constructor. heads x dim_head differ from the width of every stage.
TWO_STAGES = {"dim": (48, 32), "depth": (2, 2), "max_seq_len": (64, 8), "dim_head": 16, "heads": 3}
THREE_STAGES = {"dim": (48, 40, 32), "depth": (2, 1, 2), "max_seq_len": (64, 4, 2), "dim_head": 8, "heads": 5}
MODELS = {
    "2 stages": TWO_STAGES,
    "2 stages, rel_pos": TWO_STAGES | {"rel_pos": True},
    "2 stages, pos_emb": TWO_STAGES | {"pos_emb": True},
    "2 stages, rel_pos and pos_emb": TWO_STAGES | {"rel_pos": True, "pos_emb": True},
    "3 stages": THREE_STAGES,
    "3 stages, rel_pos": THREE_STAGES | {"rel_pos": True},
    "3 stages, pos_emb": THREE_STAGES | {"pos_emb": True},
    "3 stages, rel_pos and pos_emb": THREE_STAGES | {"rel_pos": True, "pos_emb": True},
    "4 stages": {"dim": (24, 24, 24, 16), "depth": (1,) * 4, "max_seq_len": (32, 2, 4, 2), "dim_head": 8, "heads": 2},
    "one width, ff_mult 3, one head": {
        "dim": 32, "depth": (1, 1), "max_seq_len": (64, 4), "dim_head": 32, "heads": 1, "ff_mult": 3,
    },
    "the default heads": {"dim": (32, 16), "depth": (1, 1), "max_seq_len": (64, 8)},
    "an odd patch, more ids than bytes": {
        "dim": (32, 16), "depth": (1, 2), "max_seq_len": (64, 3), "dim_head": 8, "heads": 2, "num_tokens": 260,
    },
}  # fmt: skip


def make(options, seed=0):
    """A model with random weights, norms included, so that no part can be left out unnoticed."""
    torch.manual_seed(seed)
    model = MEGABYTE(**{"num_tokens": 256, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.startswith("start_tokens"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def import_options(options):
    patches, *rest = options["max_seq_len"]
    heads = None if "heads" not in options else options["heads"]
    return ImportOptions(heads=heads, max_bytes=patches * int(np.prod(rest)))


def read(model, options, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    told = "heads" in options or options.get("rel_pos", False)
    with contextlib.nullcontext() if told else pytest.warns(AssumptionWarning, match="assumed heads=8;"):
        return load(folder / "model.pt", device="cpu", options=import_options(options))


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """A torch model, and the same read by marlin."""
    options = MODELS[request.param]
    model = make(options)
    return model, read(model, options, tmp_path)


@torch.no_grad()
def their_logits(model, data):
    """Logits that follow each byte of `data`."""
    return model(torch.tensor(list(data), dtype=torch.long)[None])[0].numpy()


@pytest.mark.parametrize("length", LENGTHS)
def test_logits(pair, length):
    model, ours = pair
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    theirs = their_logits(model, data)
    # Theirs follow each byte, ours are of each byte: of one more, whatever it is.
    logits = np.array(ours.logits(data + b"?"))
    assert np.abs(theirs).max() > 0.5
    assert np.abs(logits[1:] - theirs).max() < TOLERANCE


def test_logits_of_nothing(pair):
    model, ours = pair
    with torch.no_grad():
        theirs = model(torch.zeros((1, 0), dtype=torch.long))[0, 0].numpy()
    assert np.abs(np.array(ours.network.logits_of_nothing(1))[0] - theirs).max() < TOLERANCE


def test_the_first_byte_is_predicted_as_in_training(pair):
    """Its loss is the only place where it predicts the first byte of a text; marlin's first row gives the same."""
    model, ours = pair
    data = np.random.default_rng(5).integers(1, 256, 4 * ours.config.patch_size, dtype=np.uint8)
    with torch.no_grad():
        theirs = model(torch.tensor(data.astype(np.int64))[None], return_loss=True).item()
    logits = ours.logits(data.tobytes())
    chosen = mx.take_along_axis(logits, mx.array(data.astype(np.int32))[:, None], axis=1)[:, 0]
    assert abs((mx.logsumexp(logits, axis=1) - chosen).mean().item() - theirs) < TOLERANCE


WRITINGS = {
    "zip": lambda model, path: torch.save(model.state_dict(), path),
    "legacy": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda model, path: torch.save(model.state_dict(), path, pickle_protocol=4),
    "parameters": lambda model, path: torch.save(dict(model.named_parameters()), path),
    "with an optimizer": lambda model, path: torch.save(
        {"model": model.state_dict(), "optimizer": trained(model).state_dict(), "epoch": 3}, path
    ),
    "data parallel": lambda model, path: torch.save(torch.nn.DataParallel(model).state_dict(), path),
    "bfloat16": lambda model, path: torch.save(model.bfloat16().state_dict(), path),
    "float64": lambda model, path: torch.save(model.double().state_dict(), path),
}


def trained(model):
    """An optimizer with a state, as one step leaves it (the learning rate is zero)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.ones((1, 8), dtype=torch.long), return_loss=True).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("writing", WRITINGS)
def test_every_way_to_save(writing, suffix, tmp_path):
    options = TWO_STAGES
    model = make(options)
    WRITINGS[writing](model, tmp_path / f"model{suffix}")
    ours = load(tmp_path / f"model{suffix}", device="cpu", options=import_options(options))
    theirs = their_logits(model.float(), b"some bytes")
    assert np.abs(np.array(ours.logits(b"some bytes"))[1:] - theirs[:-1]).max() < TOLERANCE


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = make(TWO_STAGES | {"rel_pos": True})
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    ours = load(tmp_path / "model.safetensors", device="cpu", options=import_options(TWO_STAGES))
    assert np.abs(np.array(ours.logits(b"some bytes"))[1:] - their_logits(model, b"some bytes")[:-1]).max() < TOLERANCE


@pytest.mark.parametrize("name", ["2 stages", "2 stages, rel_pos and pos_emb", "3 stages", "3 stages, rel_pos and pos_emb"])
@pytest.mark.parametrize("prompt_bytes", PROMPT_BYTES)
def test_greedy_bytes(name, prompt_bytes, tmp_path):
    options = MODELS[name]
    model = make(options)
    ours = read(model, options, tmp_path)
    prompt = np.random.default_rng(prompt_bytes).integers(0, 256, prompt_bytes, dtype=np.uint8).tobytes()
    expected = list(prompt)
    for _ in range(GREEDY_BYTES):
        expected.append(int(their_logits(model, expected)[-1].argmax()))
    assert ours.generate(prompt, max_bytes=GREEDY_BYTES, temperature=0.0) == bytes(expected[prompt_bytes:])
