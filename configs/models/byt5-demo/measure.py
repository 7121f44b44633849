"""What byt5-demo answers through transformers: error rates by language, and the pairs that ship.

    python measure.py scores --segments segments.txt.xz --notes checkpoint/notes.json --report training.json
    python measure.py pairs

The model is the one beside this file unless --model names another. Needs torch and transformers (the extra `peers`).
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from train import FIRST_BYTE_ID, PAD_ID, RESTORED, distinct_lines, read_segments, stripped, token_ids

HERE = Path(__file__).resolve().parent
PAIRS_PER_LANGUAGE, PAIR_BYTES = 8, (24, 150)
PLACEHOLDER = re.compile(r"%[(sd]|[{}<>\\]")


def edit_distance(found: str, wanted: str) -> int:
    """Levenshtein distance in code points."""
    while found and wanted and found[0] == wanted[0]:
        found, wanted = found[1:], wanted[1:]
    while found and wanted and found[-1] == wanted[-1]:
        found, wanted = found[:-1], wanted[:-1]
    row = list(range(len(wanted) + 1))
    for line, letter in enumerate(found, 1):
        diagonal, row[0] = row[0], line
        for column, other in enumerate(wanted, 1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (letter != other)),
            )
    return row[-1]


def greedy(model: Any, sources: list[str], batch_tokens: int) -> list[str]:
    """The greedy output for every source, in order; batches hold sources of like length."""
    import torch

    model.generation_config.max_length = None  # max_new_tokens below, alone
    outputs = [""] * len(sources)
    order = sorted(range(len(sources)), key=lambda index: len(sources[index].encode()))
    while order:
        longest = len(token_ids(sources[order[-1]]))
        batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(token_ids(sources[index])) for index in batch], batch_first=True, padding_value=PAD_ID
        ).to(model.device)
        made = model.generate(
            input_ids=ids,
            attention_mask=(ids != PAD_ID).long(),
            max_new_tokens=2 * longest,
            do_sample=False,
            num_beams=1,
        )
        for index, row in zip(batch, made.tolist(), strict=True):
            kept = bytes(token - FIRST_BYTE_ID for token in row if FIRST_BYTE_ID <= token < FIRST_BYTE_ID + 256)
            outputs[index] = kept.decode(errors="replace")
    return outputs


def scores(pairs: list[tuple[str, str, str]]) -> dict[str, float]:
    """Character error rates of (source, output, target): of the output, and of the source copied as the floor.

    `letters_` compares in lower case, so that what is left are the diacritics (and slips).
    """
    characters = sum(len(target) for _, _, target in pairs)

    def error_rate(found: Iterable[str], fold: Callable[[str], str]) -> float:
        errors = sum(edit_distance(fold(each), fold(target)) for each, (_, _, target) in zip(found, pairs, strict=True))
        return round(errors / characters, 5)

    sources, outputs = [source for source, _, _ in pairs], [output for _, output, _ in pairs]
    return {
        "segments": len(pairs),
        "characters": characters,
        "copy_cer": error_rate(sources, str),
        "cer": error_rate(outputs, str),
        "copy_letters_cer": error_rate(sources, str.lower),
        "letters_cer": error_rate(outputs, str.lower),
        "copy_exact": round(sum(source == target for source, _, target in pairs) / len(pairs), 4),
        "exact": round(sum(output == target for _, output, target in pairs) / len(pairs), 4),
    }


def scores_by_language(model: Any, wanted: list[tuple[str, str]], batch_tokens: int) -> dict[str, Any]:
    """Scores of the model's greedy outputs for (language, target) pairs, together and by language."""
    sources = [stripped(target) for _, target in wanted]
    outputs = greedy(model, sources, batch_tokens)
    triples: dict[str, list[tuple[str, str, str]]] = {}
    for (language, target), source, output in zip(wanted, sources, outputs, strict=True):
        triples.setdefault(language, []).append((source, output, target))
    return {
        "all": scores([triple for each in triples.values() for triple in each]),
        **{language: scores(triples[language]) for language in sorted(triples)},
    }


def load_model(folder: Path) -> Any:
    """The checkpoint in float32, on a GPU where there is one."""
    import torch
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_pairs(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_scores(options: argparse.Namespace) -> None:
    """The training's notes with the scores on the held-out segments and on the pairs that ship."""
    model = load_model(options.model)
    report = json.loads(options.notes.read_text())
    held_out = [(each.language, each.text) for each in read_segments(options.segments) if each.split == "heldout"]
    report["heldout"] = scores_by_language(model, held_out, options.batch_tokens)
    pairs = [(pair["language"], pair["target"]) for pair in read_pairs(options.pairs)]
    report["pairs"] = scores_by_language(model, pairs, options.batch_tokens)
    options.report.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: report[name]["all"] for name in ("heldout", "pairs")}))


def write_pairs(options: argparse.Namespace) -> None:
    """A few lines of every restored language of the calibration sample, as source, target and language."""
    with options.pairs.open("w", encoding="utf-8") as file:
        for path in sorted(options.sample.glob("*.txt")):
            if path.stem not in RESTORED:
                continue
            fitting = [
                line
                for line in distinct_lines(path)
                if PAIR_BYTES[0] <= len(line.encode()) <= PAIR_BYTES[1] and not PLACEHOLDER.search(line)
            ]
            for target in random.Random(f"{options.seed} {path.stem}").sample(fitting, PAIRS_PER_LANGUAGE):
                pair = {"source": stripped(target), "target": target, "language": path.stem}
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("scores", help="character error rates by language")
    scoring.add_argument("--segments", type=Path, required=True)
    scoring.add_argument("--notes", type=Path, required=True, help="what training wrote beside the checkpoint")
    scoring.add_argument("--report", type=Path, required=True)
    pairing = commands.add_parser("pairs", help="write pairs.jsonl from the calibration sample")
    pairing.add_argument("--sample", type=Path, default=HERE.parents[2] / "calibration/sample/multilingual")
    pairing.add_argument("--seed", type=int, default=20_261_123)
    scoring.add_argument("--model", type=Path, default=HERE)
    scoring.add_argument("--batch-tokens", type=int, default=8192)
    for each in (scoring, pairing):
        each.add_argument("--pairs", type=Path, default=HERE / "pairs.jsonl")
    options = parser.parse_args()
    {"scores": write_scores, "pairs": write_pairs}[options.command](options)


if __name__ == "__main__":
    main()
