"""How this model was made: a MegaByte in marlin's own layout, trained in PyTorch on one GPU for a given time.

    python train.py train --corpus CORPUS --heldout HELDOUT --out OUT --state STATE --seconds 980
    python train.py join OUT/model-*.safetensors -o model.safetensors

CORPUS holds a folder for each domain (multilingual, code, binary) with one file for each language or kind, and
beside it NAME.starts, where its documents begin (uint32), if that matters. All of it lies in the GPU's memory, and
windows are drawn there. The learning rate follows the clock, so a slow machine sees fewer bytes and ends as well.
Every minute the state is kept; started again with the same --state, training goes on where it stood.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from network import CONFIG, MegaByte, Muon  # beside this file
from safetensors.torch import load_file, save_file
from torch import Tensor

# Of the bytes seen in training; how far a large group counts more than a small one; how often a window begins where
# a document does, as its header is all that is known of it then.
SHARES = {"multilingual": 0.5, "code": 0.25, "binary": 0.25}
TEMPERATURE = {"multilingual": 0.35, "code": 0.4, "binary": 0.15}
AT_START = {"multilingual": 0.0, "code": 0.1, "binary": 0.5}
# Windows of these lengths fill a batch, each length for its share of the steps: most are as long as those that
# are measured, some long enough that rotary positions are met far out.
WINDOWS = {2048: 0.85, 8192: 0.15}
HELDOUT_BYTES, HELDOUT_WINDOW = 4096, 2048
PART_BYTES = 15 << 20


@dataclass(frozen=True)
class Group:
    """One language or kind of file in the corpus."""

    name: str
    domain: str
    first: int  # of its bytes in the corpus
    size: int  # of what is trained on; the validation cut lies behind it


class Corpus:
    """All bytes on the device, and windows drawn from them."""

    def __init__(self, folder: Path, device: str, longest: int) -> None:
        parts, starts, self.groups, self.validation = [], [], [], []
        first_start, counts, total = [], [], 0
        for domain in SHARES:
            for path in sorted((folder / domain).iterdir()):
                if path.suffix == ".starts":
                    continue
                data = np.fromfile(path, np.uint8)
                cut = max(2048, min(len(data) // 100, 16384)) // 2048 * 2048
                if len(data) - cut < 2 * longest:
                    continue
                table = path.with_name(path.name + ".starts")
                begins = np.fromfile(table, np.uint32).astype(np.int64) if table.exists() else np.zeros(0, np.int64)
                begins = begins[begins < len(data) - cut - longest]
                first_start.append(sum(counts))
                counts.append(len(begins))
                starts.append(begins + total)
                self.groups.append(Group(path.name, domain, total, len(data) - cut))
                self.validation.append((domain, torch.from_numpy(data[-cut:].copy()).view(-1, 2048)))
                parts.append(data)
                total += len(data)
        self.bytes = torch.from_numpy(np.concatenate(parts)).to(device)
        self.starts = torch.from_numpy(np.concatenate([*starts, [0]])).to(device)
        self.first_start, self.counts, self.first, self.size = (
            torch.tensor(values, device=device)
            for values in (first_start, counts, [g.first for g in self.groups], [g.size for g in self.groups])
        )
        names = list(SHARES)
        weights = torch.tensor([float(g.size) ** TEMPERATURE[g.domain] for g in self.groups])
        self.domain = torch.tensor([names.index(g.domain) for g in self.groups])
        for number, name in enumerate(names):
            of_domain = self.domain == number
            weights[of_domain] *= SHARES[name] / weights[of_domain].sum()
        self.weights, self.domain = weights.to(device), self.domain.to(device)
        self.at_start = torch.tensor([AT_START[g.domain] * (count > 0) for g, count in zip(self.groups, counts, strict=True)])
        self.at_start = self.at_start.to(device)

    def windows(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Random windows [count, length], and the domain of each."""
        device = self.bytes.device
        group = torch.multinomial(self.weights, count, replacement=True)
        part, choice = torch.rand(2, count, device=device, dtype=torch.float64)
        anywhere = self.first[group] + ((self.size[group] - length) * part).long() // 4 * 4
        begin = self.starts[self.first_start[group] + (self.counts[group] * part).long().clamp(max=len(self.starts) - 1)]
        # A document's second window is as often wanted as its first.
        begin = begin + torch.where(choice * 2 < self.at_start[group], 0, length)
        begin = torch.minimum(begin, self.first[group] + self.size[group] - length)
        position = torch.where(choice < self.at_start[group], begin, anywhere)
        return self.bytes[position[:, None] + torch.arange(length, device=device)].long(), self.domain[group]


def optimizers(model: MegaByte) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, projections at the ends and norms."""
    inner = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.dim() == 2]
    chosen = {id(weight) for weight in inner}
    outer = [weight for weight in model.parameters() if id(weight) not in chosen]
    fused = outer[0].is_cuda
    return [Muon(inner, lr=0.02), torch.optim.AdamW(outer, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)]


def rate(done: float, step: int) -> float:
    """The part of the learning rate at `done` (0 to 1) of the time: warm-up by steps, plateau, to nothing at the end."""
    return min(1.0, (step + 1) / 200, max(0.0, (1 - done) / 0.4))


def by_domain(corpus: Corpus, model: MegaByte, device: str) -> dict[str, float]:
    """Bits per byte of the validation cut: the mean over the groups of a domain."""
    sums: dict[str, list[float]] = {name: [] for name in SHARES}
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16), model.eager():
        for domain, windows in corpus.validation:
            sums[domain].append(model(windows.long().to(corpus.bytes.device)).mean().item())
    return {name: round(sum(bits) / max(1, len(bits)), 4) for name, bits in sums.items()}


def held_out(model: MegaByte, folder: Path, device: str) -> dict[str, dict[str, float]]:
    """Bits per byte of held-out files by domain: total bits over total bytes, in float32."""
    found: dict[str, dict[str, float]] = {}
    for domain in SHARES:
        bits, count = 0.0, 0
        for path in sorted(p for p in (folder / domain).rglob("*") if p.is_file()):
            data = np.fromfile(path, np.uint8)[:HELDOUT_BYTES]
            for start in range(0, len(data), HELDOUT_WINDOW):
                window = data[start : start + HELDOUT_WINDOW]
                full = np.pad(window, (0, -len(window) % model.config["patch_size"]))
                with torch.no_grad():
                    each = model(torch.from_numpy(full).long()[None].to(device))[0, : len(window)]
                bits, count = bits + each.double().sum().item(), count + len(window)
        found[domain] = {"bits_per_byte": round(bits / max(1, count), 5), "bytes": count}
    return found


def in_parts(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in files small enough to be carried."""
    part: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > PART_BYTES:
            yield part
            part = {}
        part[name] = tensor
    yield part


def write(model: MegaByte, settings: argparse.Namespace, seen: dict[str, float], device: str) -> None:
    """Weights in float16, the config, held-out numbers of exactly these weights, and a few logits of them."""
    out: Path = settings.out
    weights = {name: weight.detach().half().cpu().contiguous() for name, weight in model.state_dict().items()}
    for number, part in enumerate(in_parts(weights)):
        save_file(part, out / f"model-{number}.safetensors", metadata={"format": "mlx"})
    (out / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    exact = MegaByte(model.config).to(device)
    exact.load_state_dict({name: weight.float() for name, weight in weights.items()})
    params = sum(weight.numel() for weight in weights.values())
    numbers = {"parameters": params, **seen, "heldout": held_out(exact, settings.heldout, device)}
    (out / "training.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print("held out", numbers["heldout"], flush=True)
    golden: dict[str, Tensor] = {}
    exact.cpu()  # a GPU may round what goes into its products
    for domain in SHARES:
        for number, path in enumerate(sorted(p for p in (settings.heldout / domain).rglob("*") if p.is_file())[:1]):
            ids = torch.from_numpy(np.fromfile(path, np.uint8)[:256].copy())
            with torch.no_grad():
                logits = exact.logits(exact.states(ids.long()[None])[0], ids.long().view(-1, model.config["patch_size"]))
            golden[f"{domain}{number}.bytes"], golden[f"{domain}{number}.logits"] = ids, logits.flatten(0, 1)
    save_file(golden, out / "golden.safetensors")


def train(settings: argparse.Namespace) -> None:
    begun = time.monotonic()
    device = settings.device
    settings.state.parent.mkdir(parents=True, exist_ok=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = MegaByte({**CONFIG, **json.loads(settings.config)}).to(device)
    corpus = Corpus(settings.corpus, device, max(WINDOWS))
    steppers = optimizers(model)
    before, step, seen = 0.0, 0, 0
    if settings.state.exists():
        state = torch.load(settings.state, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, kept in zip(steppers, state["steppers"], strict=True):
            stepper.load_state_dict(kept)
        before, step, seen = state["elapsed"], state["step"], state["seen"]
    sizes = {name: sum(g.size for g in corpus.groups if g.domain == name) for name in SHARES}
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, corpus {sizes}, from {before:.0f} s on, step {step}", flush=True)

    def loss_of(length: int) -> tuple[Tensor, Tensor]:
        ids, domain = corpus.windows(max(1, settings.batch_bytes // length), length)
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(ids).mean(1), domain

    def warm() -> None:
        for length in WINDOWS:
            loss_of(length)[0].mean().backward()

    if settings.compile:
        try:
            model.compiled()
            warm()
        except Exception as error:  # whatever the compiler lacks, the same network runs without it
            print(f"not compiled: {error!r:.300}", flush=True)
            model.as_written()
        print(f"ready after {time.monotonic() - begun:.1f} s", flush=True)

    def keep() -> None:
        kept = {"model": model.state_dict(), "steppers": [s.state_dict() for s in steppers], "step": step, "seen": seen}
        partly = settings.state.with_suffix(".partly")
        torch.save({**kept, "elapsed": before + time.monotonic() - begun}, partly)
        partly.replace(settings.state)

    peaks = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    peaks = [[0.02] * len(peaks[0]), [3e-3] * len(peaks[1])]
    lengths = np.random.default_rng(step)
    sums = torch.zeros(len(SHARES), 2, device=device)
    told = saved = time.monotonic()
    seen_then = seen
    while (elapsed := before + time.monotonic() - begun) < settings.seconds:
        length = int(lengths.choice(list(WINDOWS), p=list(WINDOWS.values())))
        bits, domain = loss_of(length)
        for stepper in steppers:
            stepper.zero_grad(set_to_none=True)
        bits.mean().backward()
        part = rate(elapsed / settings.seconds, step)
        for stepper, values in zip(steppers, peaks, strict=True):
            for group, peak in zip(stepper.param_groups, values, strict=True):
                group["lr"] = peak * part
            stepper.step()
        sums.index_add_(0, domain, torch.stack([bits.detach().float(), torch.ones_like(bits, dtype=torch.float)], dim=1))
        step, seen = step + 1, seen + bits.shape[0] * length
        if step % 10 == 0 and device == "cuda":
            torch.cuda.synchronize()  # the clock is asked before each step, so the queue must not run far ahead
        now = time.monotonic()
        if now - told > settings.every:
            loss = dict(zip(SHARES, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
            speed = (seen - seen_then) / (now - told) / 1e6
            words = " ".join(f"{name} {value:.3f}" for name, value in loss.items())
            print(f"{elapsed:.0f} s, step {step}, {seen / 1e6:.0f} MB, {speed:.2f} MB/s, rate {part:.3f}: {words}", flush=True)
            sums.zero_()
            told, seen_then = now, seen
        if now - saved > settings.keep_every:
            keep()
            print("validation", by_domain(corpus, model, device), flush=True)
            saved = time.monotonic()
    keep()
    seen_all = {"bytes_seen": seen, "steps": step, "seconds": round(before + time.monotonic() - begun, 1)}
    print("validation", by_domain(corpus, model, device), seen_all, flush=True)
    write(model, settings, seen_all, device)


def join(settings: argparse.Namespace) -> None:
    """The parts of a model's weights as one file."""
    tensors: dict[str, Tensor] = {}
    for part in settings.parts:
        tensors |= load_file(part)
    save_file(tensors, settings.output, metadata={"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train")
    for name in ("corpus", "heldout", "out", "state"):
        command.add_argument(f"--{name}", type=Path, required=True)
    command.add_argument("--seconds", type=float, default=1000.0, help="of training in all, over all starts")
    command.add_argument("--batch-bytes", type=int, default=1 << 18)
    command.add_argument("--config", default="{}", help="JSON: what is other than CONFIG")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--no-compile", dest="compile", action="store_false")
    command.add_argument("--every", type=float, default=10.0, help="seconds between lines of progress")
    command.add_argument("--keep-every", type=float, default=60.0, help="seconds between kept states")
    command.set_defaults(run=train)
    command = commands.add_parser("join")
    command.add_argument("parts", nargs="+", type=Path)
    command.add_argument("-o", "--output", type=Path, required=True)
    command.set_defaults(run=join)
    settings = parser.parse_args()
    settings.run(settings)


if __name__ == "__main__":
    main()
