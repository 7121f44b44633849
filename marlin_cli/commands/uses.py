"""The table of all options: for which models each has a use, and beside which others. One without is refused in a line.

An option counts as given when it stands on the command line, with its default value too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Family(Enum):
    """Kinds of models that take different options; the value is for messages."""

    CONTINUES = "a model that continues bytes"
    ANSWERS = "a model that answers an input"
    ENCODES = "an encoder alone"
    READS = "a CANINE without a head"
    CLASSIFIES = "a CANINE that classifies texts"
    TAGS = "a CANINE that labels characters"
    FINDS = "a CANINE that answers questions"
    CHOOSES = "a CANINE that chooses between texts"
    SPLITS = "an LA-CANINE"


@dataclass(frozen=True)
class Use:
    """When an option has an effect."""

    needs: tuple[str, ...] = ()  # one of these is given too
    without: tuple[str, ...] = ()  # none of these is


Uses = Mapping[Family, Use]  # a family that is not there has no use for the option

CONTINUES, ANSWERS, ENCODES, READS, CLASSIFIES, TAGS, FINDS, CHOOSES, SPLITS = Family
ENCODER_FIRST = (ANSWERS, ENCODES)
BYTES = (CONTINUES, *ENCODER_FIRST)

# CANINE and LA-CANINE, by the names of their heads.
OF_HEAD: Mapping[str, Family] = {
    "none": READS, "sequence": CLASSIFIES, "token": TAGS, "answer": FINDS, "choice": CHOOSES, "sentence": SPLITS,
}  # fmt: skip
CHARACTERS = tuple(OF_HEAD.values())
CANINE = tuple(family for family in CHARACTERS if family is not SPLITS)


def _of(*families: Family, needs: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Uses:
    return dict.fromkeys(families or Family, Use(needs, without))


def _table(families: Sequence[Family], rows: Mapping[str, Uses]) -> Mapping[str, Uses]:
    """The options of a command that serves some families alone."""
    return {option: {each: use for each, use in uses.items() if each in families} for option, uses in rows.items()}


# Filters of draws keep the likeliest byte, so that `--temperature 0` with them is what it is without: it is allowed, and
# so is a seed that decides nothing, as scripts pass them always. Without any temperature a filter would be a mistake.
_FILTER = _of(needs=("--temperature",), without=("--beams",))
_BEAMS = _of(*ENCODER_FIRST, needs=("--beams",))
_ONE_PROMPT = ("--prompt", "--prompt-file", "--hex", "--prompts")


def _prompt(option: str) -> Uses:
    return _of(without=tuple(each for each in _ONE_PROMPT if each != option))


# An encoder alone is refused by the model itself, which alone knows without another look at its weights.
GENERATE: Mapping[str, Uses] = _table(BYTES, {
    "MODEL": _of(),
    **{option: _prompt(option) for option in _ONE_PROMPT},
    "--max-bytes": _of(without=("--max-length",)),
    "--temperature": _of(),  # 0 with --beams is what beams do
    "--top-k": _FILTER,
    "--top-p": _FILTER,
    "--min-p": _FILTER,
    "--seed": _of(),
    "--stop": _of(without=("--beams",)),
    "--stop-hex": _of(without=("--beams",)),
    "--kv-bits": _of(),
    "--k-bits": _of(CONTINUES),
    "--v-bits": _of(CONTINUES),
    "--activation-bits": _of(),
    "--beams": _of(*ENCODER_FIRST),
    "--n-best": _BEAMS,
    "--length-penalty": _BEAMS,
    "--early-stopping": _BEAMS,
    "--max-length": _of(*ENCODER_FIRST),
    "--min-length": _of(*ENCODER_FIRST),
    "--prefix": _of(*ENCODER_FIRST),
    "--input-prefix": _of(*ENCODER_FIRST),
    "--sentinel": _of(*ENCODER_FIRST),
    "--batch-size": _of(),  # at most so many: one prompt keeps to it
    "--raw": _of(without=("--json", "--prompts")),
    "--json": _of(),  # what --prompts writes anyway
    "--import": _of(CONTINUES),
    "--device": _of(),
})  # fmt: skip

_MEASURING = ("--show", "--merge")

CALIBRATE: Mapping[str, Uses] = _table(BYTES, {
    "MODEL|FILE": _of(without=("--show",)),
    "--corpus": _of(without=(*_MEASURING, "--pairs")),
    "--pairs": _of(*ENCODER_FIRST, without=_MEASURING),
    "--output": _of(without=("--show",)),
    "--max-bytes": _of(without=_MEASURING),
    "--seq-bytes": _of(without=_MEASURING),
    "--noise-density": _of(*ENCODER_FIRST, without=(*_MEASURING, "--pairs")),
    "--span-bytes": _of(*ENCODER_FIRST, without=(*_MEASURING, "--pairs")),
    "--seed": _of(without=_MEASURING),
    "--shard": _of(without=_MEASURING),
    "--resume": _of(without=_MEASURING),  # without a beginning it begins, so that one line does for both
    "--hessian": _of(without=_MEASURING),
    "--merge": _of(without=("--show",)),
    "--show": _of(),
    "--json": _of(),
    "--import": _of(CONTINUES, without=_MEASURING),
    "--device": _of(without=_MEASURING),
})  # fmt: skip

_UNPACKING = ("--dequantize",)
_PACKING = _of(without=_UNPACKING)
_OF_CONTINUING = _of(CONTINUES, without=_UNPACKING)
_CALIBRATED = ("--sequential", "--target-bpw")

# What --dry-run writes nothing of is allowed beside it: it is put before the line of the run that it is of.
QUANTIZE: Mapping[str, Uses] = _table(BYTES, {
    "MODEL": _of(),
    "--output": _of(),
    "--global-bits": _OF_CONTINUING,
    "--local-bits": _OF_CONTINUING,
    "--encoder-bits": _of(*ENCODER_FIRST, without=_UNPACKING),
    "--decoder-bits": _of(ANSWERS, without=_UNPACKING),
    "--cross-bits": _of(ANSWERS, without=_UNPACKING),
    "--wo-bits": _of(*ENCODER_FIRST, without=_UNPACKING),
    "--kv-bits": _of(CONTINUES, ANSWERS, without=_UNPACKING),
    "--balance-keys": _of(CONTINUES, ANSWERS, needs=("--stats",), without=_UNPACKING),
    "--global-format": _OF_CONTINUING,
    "--local-format": _OF_CONTINUING,
    "--group-size": _PACKING,
    "--stats": _of(without=(*_UNPACKING, "--sequential")),  # with --method rtn too: errors are of the outputs then
    "--method": _PACKING,
    "--domain-weight": _of(needs=("--stats", "--sequential"), without=_UNPACKING),
    "--sequential": _PACKING,
    "--sequential-bytes": _of(needs=("--sequential",)),
    "--target-bpw": _of(CONTINUES, ANSWERS, without=_UNPACKING),
    "--save-recipe": _of(CONTINUES, ANSWERS, needs=("--target-bpw",)),
    "--calibration-corpus": _of(needs=_CALIBRATED, without=("--calibration-pairs",)),
    "--calibration-pairs": _of(*ENCODER_FIRST, needs=_CALIBRATED),
    "--distill-steps": _of(CONTINUES, ANSWERS, without=_UNPACKING),
    "--distill-corpus": _of(CONTINUES, ANSWERS, needs=("--distill-steps",), without=("--distill-pairs",)),
    "--distill-pairs": _of(ANSWERS, needs=("--distill-steps",)),
    "--recipe": _PACKING,
    "--override": _PACKING,
    "--report": _of(without=(*_UNPACKING, "--dry-run")),
    "--export": _PACKING,
    "--dry-run": _of(),
    "--dequantize": _of(),
    "--overwrite": _of(needs=("--output",)),
    "--import": _of(CONTINUES),
    "--json": _of(),
})  # fmt: skip

_NOTHING_RUN = ("--kernels", "--compare")
_NOT_MEASURED = (*_NOTHING_RUN, "--plan")
_NOT_TIMED = (*_NOT_MEASURED, "--no-throughput")
_SCORED = ("--quality",)

BENCH: Mapping[str, Uses] = _table(BYTES, {
    "MODEL": _of(without=_NOTHING_RUN),
    "--prompt-bytes": _of(without=_NOT_TIMED),
    "--decode-bytes": _of(CONTINUES, ANSWERS, without=_NOT_TIMED),
    "--repeats": _of(without=_NOT_TIMED),
    "--seconds": _of(CONTINUES, without=_NOT_TIMED),
    "--roofline": _of(CONTINUES, without=_NOT_TIMED),
    "--no-throughput": _of(without=_NOT_MEASURED),
    "--quality": _of(CONTINUES, ANSWERS, without=_NOT_MEASURED),
    "--reference": _of(CONTINUES, ANSWERS, needs=_SCORED),
    "--window-bytes": _of(CONTINUES, needs=_SCORED),
    "--stride-bytes": _of(CONTINUES, needs=_SCORED),
    "--max-bytes-per-file": _of(CONTINUES, needs=_SCORED),
    "--max-quality-bytes": _of(CONTINUES, ANSWERS, needs=_SCORED),
    "--resume": _of(CONTINUES, needs=_SCORED),  # without a beginning it begins, as in calibrate
    "--reference-cache": _of(CONTINUES, needs=("--reference",)),
    # What continues bytes is scored without a cache; answers read one.
    "--kv-bits": {
        CONTINUES: Use(without=(*_NOTHING_RUN, "--no-throughput")),
        ANSWERS: Use(without=_NOT_MEASURED),
    },
    "--k-bits": _of(CONTINUES, without=(*_NOTHING_RUN, "--no-throughput")),
    "--v-bits": _of(CONTINUES, without=(*_NOTHING_RUN, "--no-throughput")),
    "--activation-bits": _of(without=_NOT_MEASURED),
    "--kernels": _of(without=("--compare", "--plan")),
    "--format": _of(without=("--kernels", "--plan")),
    "--output": _of(without=("--kernels", "--plan")),
    "--report": _of(without=_NOT_MEASURED),
    "--plot": _of(without=_NOT_MEASURED),
    "--device": _of(without=("--compare",)),
    "--against": _of(CONTINUES, without=_NOT_TIMED),
    "--save": _of(without=_NOT_MEASURED),
    "--compare": _of(),
    "--plan": _of(CONTINUES, without=("--compare",)),
    "--context": _of(CONTINUES, without=(*_NOTHING_RUN, "--no-throughput")),
    "--batch": _of(without=_NOT_TIMED),
    "--bits": _of(CONTINUES, needs=("--plan",)),
    "--bandwidth": _of(CONTINUES, needs=("--plan",)),
})  # fmt: skip

# What a text is labelled by; a ByT5 without labels, and a CANINE without a head, are refused by the command itself.
LABEL: Mapping[str, Uses] = _table((*ENCODER_FIRST, *CHARACTERS), {
    "MODEL": _of(),
    **{option: _prompt(option) for option in _ONE_PROMPT},
    "--tabs": _of(CLASSIFIES, without=_ONE_PROMPT),
    "--second": _of(CLASSIFIES, without=("--tabs",)),
    "--question": _of(FINDS),
    "--choice": _of(CHOOSES),
    "--language": _of(SPLITS),
    "--threshold": _of(ENCODES, CLASSIFIES, TAGS, FINDS, CHOOSES, SPLITS),
    "--best": _of(CLASSIFIES, FINDS, CHOOSES),
    "--outside": _of(ENCODES, TAGS),
    "--no-merge": _of(ENCODES, TAGS),
    "--pad-to": _of(CLASSIFIES, TAGS, FINDS, CHOOSES),
    "--window": _of(FINDS, SPLITS),
    "--stride": _of(FINDS, SPLITS),
    "--longest": _of(FINDS, SPLITS),
    "--lines": _of(SPLITS, without=("--prompts",)),
    "--raw": _of(SPLITS, needs=("--lines",)),
    "--batch-size": _of(ENCODES, CLASSIFIES, TAGS, FINDS, CHOOSES),
    "--activation-bits": _of(),
    "--dtype": _of(),
    "--device": _of(),
})  # fmt: skip

ENCODE: Mapping[str, Uses] = _table((*ENCODER_FIRST, *CHARACTERS), {
    "MODEL": _of(),
    **{option: _prompt(option) for option in _ONE_PROMPT},
    "--pool": _of(),
    "--output": _of(),
    "--pad-to": _of(*CHARACTERS),
    "--language": _of(SPLITS),
    "--batch-size": _of(),
    "--activation-bits": _of(),
    "--dtype": _of(),
    "--device": _of(),
})  # fmt: skip

USES: Mapping[str, Mapping[str, Uses]] = {
    "calibrate": CALIBRATE,
    "quantize": QUANTIZE,
    "generate": GENERATE,
    "label": LABEL,
    "encode": ENCODE,
    "bench": BENCH,
}


def families_of(command: str) -> frozenset[Family]:
    """The models that a command serves: those of its first argument."""
    return frozenset(next(iter(USES[command].values())))
