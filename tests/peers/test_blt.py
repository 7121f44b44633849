"""Byte Latent Transformers against transformers, whose cache is wrong and is left out: random models in its own layout."""

import mlx.core as mx
import numpy as np
import pytest
from blt_cases import blt_folder, random_blt

from marlin_cli import load
from marlin_cli.models.blt_config import StackConfig

pytestmark = pytest.mark.peers

transformers = pytest.importorskip("transformers", minversion="5.23")
torch = pytest.importorskip("torch")

DATA = ("Bytes, é 東\x00 and more of them; " * 4).encode()[:120]


def theirs(folder):
    model = transformers.BltForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def logits_of(model, texts):
    ids = torch.tensor([[1, *(value + 4 for value in text)] for text in texts])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.numpy()


CASES = {
    "windows": {},
    "another patcher": {"seed": 3},
    "all seen": {"patcher_window": None, "local_window": None},
    "7B": {"patches": StackConfig(48, 96, 2, 2)},
    "three rows a patch": {"patch_rows": 3, "patches": StackConfig(96, 96, 2, 1)},
    "one reader, two layers of the encoder": {"cross_every_layer": False, "encoder": StackConfig(32, 48, 2, 2)},
    "two hash functions": {"hash_functions": 2, "hash_lengths": (3, 8)},
    "hardly a patch": {"threshold": 100.0},
    "a patch a byte": {"threshold": 0.0},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits(changes, tmp_path):
    folder = blt_folder(tmp_path / "model", random_blt(**changes))
    texts = [DATA, DATA[::-1], bytes(range(120))]
    wanted = logits_of(theirs(folder), texts)
    model = load(folder, device="cpu")
    for text, rows in zip(texts, wanted, strict=True):
        assert np.abs(np.array(model.logits(text)) - rows[: len(text)]).max() < 1e-4
    together = model.network.predictions(mx.array([list(text) for text in texts]))
    assert np.abs(np.array(together) - wanted[:, : len(DATA)]).max() < 1e-4


def test_patches_cut_at_a_length_but_for_the_last_byte(tmp_path):
    """There its code forgets a patch that the last byte ends, which it knows as soon as another byte follows."""
    folder = blt_folder(tmp_path / "model", random_blt(max_patch_bytes=3))
    wanted = logits_of(theirs(folder), [DATA])[0]
    assert np.abs(np.array(load(folder, device="cpu").logits(DATA)) - wanted[: len(DATA)]).max() < 1e-4


def test_greedy_bytes(tmp_path):
    folder = blt_folder(tmp_path / "model", random_blt())
    reference, ids = theirs(folder), [1, *(value + 4 for value in DATA[:20])]
    for _ in range(24):
        with torch.no_grad():
            ids.append(int(reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    found = load(folder, device="cpu").generate(DATA[:20], 24)
    followed = ids[21:]
    stop = followed.index(2) if 2 in followed else len(followed)
    assert found == bytes(value - 4 for value in followed[:stop] if value >= 4)
