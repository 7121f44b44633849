"""Writes tests/data/foreign: small random checkpoints saved by torch, and what their own implementations make of them.

Run from the checkout's root with the extra `peers`: python tests/peers/make_fixtures.py
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from MEGABYTE_pytorch import MEGABYTE
from paper_megabyte import PaperConfig, PaperMegaByte
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "data" / "foreign"
SENTENCE = "bytes: \x00\xff, é, 字".encode()
PROMPT_BYTES = 9
GREEDY_BYTES = 20


def megabyte_pytorch_logits(model, data):
    """Logits of every byte of `data` but the first, which its forward does not give."""
    return model(torch.tensor(list(data))[None])[0].numpy()[:-1]


def greedy(next_logits, prompt, count):
    data = list(prompt)
    for _ in range(count):
        data.append(int(next_logits(data).argmax()))
    return data[len(prompt) :]


def megabyte_pytorch(name, legacy, **options):
    model = MEGABYTE(num_tokens=256, **options).eval()

    def next_logits(data):
        return model(torch.tensor(data, dtype=torch.long)[None])[0, -1]

    torch.save(model.state_dict(), DATA / f"{name}.pt", _use_new_zipfile_serialization=not legacy)
    save(name, megabyte_pytorch_logits(model, SENTENCE), next_logits)


def paper(name, **options):
    config = PaperConfig(**options)
    model = PaperMegaByte(config).eval()

    def all_logits(data):
        padded = list(data) + [0] * (-len(data) % config.patch_size or config.patch_size)
        return model(torch.tensor([padded]))[0, : len(data) + 1]

    # Its training script keeps the optimizer, and losses as NumPy arrays, beside the weights.
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 0.1}]}
    document = model.checkpoint() | {"optimizer": optimizer, "losses": {"val": {"loss": 5.5, "token_XE": np.ones(3)}}}
    torch.save(document, DATA / f"{name}.pt")
    save(name, all_logits(SENTENCE)[:-1].numpy(), lambda data: all_logits(data)[-1])


def save(name, logits, next_logits):
    arrays = {
        "bytes": np.frombuffer(SENTENCE, np.uint8),
        "logits": np.ascontiguousarray(logits),
        "greedy_from_nothing": np.array(greedy(next_logits, [], GREEDY_BYTES), np.uint8),
        "greedy": np.array(greedy(next_logits, SENTENCE[:PROMPT_BYTES], GREEDY_BYTES), np.uint8),
    }
    path = DATA / f"{name}.safetensors"
    save_file(arrays, path)
    path.chmod(0o644)


@torch.no_grad()
def main():
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    DATA.mkdir(exist_ok=True)
    small = {"dim_head": 4, "heads": 3, "ff_mult": 2}
    megabyte_pytorch("megabyte_pytorch-2-stages", True, dim=(12, 8), depth=(2, 1), max_seq_len=(16, 4), **small)
    megabyte_pytorch(
        "megabyte_pytorch-3-stages", False, dim=(8, 8, 8), depth=(1, 2, 1), max_seq_len=(8, 2, 4), rel_pos=True,
        pos_emb=True, **small,
    )  # fmt: skip
    paper("paper", d_model=16, d_local=8, d_key=4, context_size=64, n_layers=1, n_local_layers=1, rope=True)


if __name__ == "__main__":
    main()
