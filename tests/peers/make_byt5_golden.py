"""Writes tests/data/byt5_demo_golden.*: what transformers makes of the shipped byt5-demo, in float32.

Run from the checkout's root with the extra `peers`: python tests/peers/make_byt5_golden.py

`.safetensors` holds for each of three pairs N, the last of them no text: `N.source` and `N.target` (bytes), `N.encoder`
[source + 1, d_model] and the teacher-forced `N.logits` [target + 1, vocabulary]. `.jsonl` holds greedy outputs.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/models/byt5-demo"
sys.path.insert(0, str(DEMO))

from measure import greedy, load_model, read_pairs  # noqa: E402
from train import END_ID, FIRST_BYTE_ID, PAD_ID  # noqa: E402

DATA = ROOT / "tests/data"
LANGUAGES = ("cs", "de", "el", "fr", "hu", "pl", "sv", "tr", "uk", "vi")  # one greedy output of each


def forced_pairs(pairs):
    """Source and target bytes to score teacher-forced: two of the pairs that ship, and bytes that are no text."""
    chosen = [next(pair for pair in pairs if pair["language"] == language) for language in ("cs", "vi")]
    texts = [(pair["source"].encode(), pair["target"].encode()) for pair in chosen]
    return [*texts, (bytes(range(0, 256, 7)), bytes(range(255, 0, -11)))]


def forced(model, source, target):
    """Encoder states and logits, as transformers computes them for one pair."""
    source_ids = torch.tensor([[*(byte + FIRST_BYTE_ID for byte in source), END_ID]])
    decoder_ids = torch.tensor([[PAD_ID, *(byte + FIRST_BYTE_ID for byte in target)]])
    with torch.no_grad():
        output = model(input_ids=source_ids, decoder_input_ids=decoder_ids)
    return output.encoder_last_hidden_state[0], output.logits[0]


def greedy_sources(pairs):
    """A source of each language, nothing at all, and a line longer than any in training."""
    chosen = [next(pair["source"] for pair in pairs if pair["language"] == language) for language in LANGUAGES]
    return [*chosen, "", " ".join(pair["source"] for pair in pairs if pair["language"] == "fr")[:400]]


def main():
    model, pairs = load_model(DEMO).cpu(), read_pairs(DEMO / "pairs.jsonl")
    tensors = {}
    for number, (source, target) in enumerate(forced_pairs(pairs)):
        encoder, logits = forced(model, source, target)
        as_bytes = {"source": source, "target": target}
        tensors |= {f"{number}.{name}": torch.tensor(list(data), dtype=torch.uint8) for name, data in as_bytes.items()}
        tensors |= {f"{number}.encoder": encoder.contiguous(), f"{number}.logits": logits.contiguous()}
    save_file(tensors, DATA / "byt5_demo_golden.safetensors")
    (DATA / "byt5_demo_golden.safetensors").chmod(0o644)
    sources = greedy_sources(pairs)
    with (DATA / "byt5_demo_golden.jsonl").open("w", encoding="utf-8") as file:
        for source, output in zip(sources, greedy(model, sources, batch_tokens=8192), strict=True):
            file.write(json.dumps({"source": source, "output": output}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
