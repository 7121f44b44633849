"""The table of all options: for which models each has a use, and beside which others. One without is refused in a line.

An option counts as given when it stands on the command line, with its default value too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Family(Enum):
    """Kinds of models that take different options; the value is for messages."""

    CONTINUES = "a model that continues bytes"  # by patches
    BYTEWISE = "a model that continues bytes one by one"
    ANSWERS = "a model that answers an input"
    ENCODER_ALONE = "an encoder alone"  # of a model that answers
    ENCODES = "a model that encodes texts"


@dataclass(frozen=True)
class Use:
    """When an option has an effect."""

    needs: tuple[str, ...] = ()  # one of these is given too
    without: tuple[str, ...] = ()  # none of these is
    unless: tuple[str, ...] = ()  # but beside one of these nothing keeps it out
    parts: tuple[str, ...] = ()  # the model has layers in one of these, see `models.part_of`
    heads: tuple[str, ...] = ()  # of what encodes texts: the model has one of these, see HEADS


Uses = Mapping[Family, Use]  # a family that is not there has no use for the option

CONTINUES, BYTEWISE, ANSWERS, ENCODER_ALONE, ENCODES = Family
CONTINUING = (CONTINUES, BYTEWISE)
ENCODER_FIRST = (ANSWERS, ENCODER_ALONE)
READS_BYTES = (*CONTINUING, *ENCODER_FIRST)
PREDICTS = (*CONTINUING, ANSWERS, ENCODES)  # an ENCODES without a head says so itself

# Whom to ask instead, where a command has no use for a family.
SERVED_BY = {
    CONTINUES: "marlin generate",
    BYTEWISE: "marlin generate",
    ANSWERS: "marlin generate and marlin encode",
    ENCODER_ALONE: "marlin label and marlin encode",
    ENCODES: "marlin label and marlin encode",
}

# The heads of what encodes texts, and what a model with each does, for messages.
HEADS = {
    "none": "encodes texts and has no head",
    "sequence": "classifies texts",
    "token": "labels characters",
    "answer": "answers questions",
    "choice": "chooses between texts",
    "sentence": "finds the ends of sentences",
}


def _of(
    *families: Family,
    needs: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
    unless: tuple[str, ...] = (),
) -> Uses:
    return dict.fromkeys(families or Family, Use(needs, without, unless, parts))


def _heads(*heads: str, of: tuple[Family, ...] = (), needs: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Uses:
    """A use for what encodes texts and has one of these heads; and for other families."""
    return {**dict.fromkeys(of, Use(needs, without)), ENCODES: Use(needs, without, heads=heads)}


# Filters of draws keep the likeliest byte, so that `--temperature 0` with them is what it is without: it is allowed, and
# so is a seed that decides nothing, as scripts pass them always. Without any temperature a filter would be a mistake.
_FILTER = _of(needs=("--temperature",), without=("--beams",))
_BEAMS = _of(*ENCODER_FIRST, needs=("--beams",))
_ONE_PROMPT = ("--prompt", "--prompt-file", "--hex", "--prompts")


def _prompt(option: str) -> Uses:
    return _of(without=tuple(each for each in _ONE_PROMPT if each != option))


# An encoder alone is refused by the model itself, which alone knows without another look at its weights. `_of()` is for
# every family that the command serves: those of its MODEL.
GENERATE: Mapping[str, Uses] = {
    "MODEL": _of(*READS_BYTES),
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
    "--k-bits": _of(*CONTINUING),
    "--v-bits": _of(*CONTINUING),
    "--window": _of(*CONTINUING, without=("--save-state", "--load-state")),
    "--sinks": _of(CONTINUES, needs=("--window",)),
    "--sparse": _of(CONTINUES),
    "--follow": _of(*CONTINUING, without=(*_ONE_PROMPT, "--chat", "--save-state", "--load-state", "--split")),
    "--activation-bits": _of(),
    "--beams": _of(*ENCODER_FIRST),
    "--n-best": _BEAMS,
    "--length-penalty": _BEAMS,
    "--early-stopping": _BEAMS,
    "--max-length": _of(*ENCODER_FIRST),
    "--min-length": _of(*ENCODER_FIRST),
    "--prefix": _of(*ENCODER_FIRST),
    "--input-prefix": _of(*ENCODER_FIRST),
    "--sentinel": _of(BYTEWISE, *ENCODER_FIRST),
    "--save-state": _of(*CONTINUING, without=("--prompts",)),
    "--load-state": _of(*CONTINUING, without=("--prompts",)),
    "--chat": _of(BYTEWISE),  # a model of another form says so itself
    "--speculate": _of(CONTINUES, *ENCODER_FIRST, without=("--beams", "--sparse", "--follow")),
    "--draft": _of(CONTINUES, needs=("--speculate",), without=("--prediction-file",)),
    "--prediction-file": _of(CONTINUES, *ENCODER_FIRST, needs=("--speculate",), without=("--prompts",)),
    "--batch-size": _of(),  # at most so many: one prompt keeps to it
    "--split": _of(CONTINUES, ANSWERS),
    "--raw": _of(without=("--json", "--prompts")),
    "--json": _of(),  # what --prompts writes anyway
    "--import": _of(*CONTINUING),
    "--device": _of(),
}

_CUT = ("answer", "sentence")  # heads that read a long text in windows
_AT_ONCE = ("sequence", "token", "answer", "choice")  # heads that read texts in batches

LABEL: Mapping[str, Uses] = {
    "MODEL": _of(ENCODER_ALONE, ENCODES),  # one without a head is refused by the command
    **{option: _prompt(option) for option in _ONE_PROMPT},
    "--tabs": _heads("sequence", without=_ONE_PROMPT),
    "--second": _heads("sequence", without=("--tabs",)),
    "--question": _heads("answer"),
    "--choice": _heads("choice"),
    "--language": _heads("sentence"),
    "--threshold": _of(),
    "--best": _heads("sequence", "answer", "choice"),
    "--outside": _heads("token", of=(ENCODER_ALONE,)),
    "--no-merge": _heads("token", of=(ENCODER_ALONE,)),
    "--pad-to": _heads(*_AT_ONCE),
    "--window": _heads(*_CUT),
    "--stride": _heads(*_CUT),
    "--longest": _heads(*_CUT),
    "--lines": _heads("sentence", without=("--prompts",)),
    "--raw": _heads("sentence", needs=("--lines",)),
    "--batch-size": _heads(*_AT_ONCE, of=(ENCODER_ALONE,)),
    "--activation-bits": _of(),
    "--dtype": _of(),
    "--device": _of(),
}

ENCODE: Mapping[str, Uses] = {
    "MODEL": _of(*ENCODER_FIRST, ENCODES),
    **{option: _prompt(option) for option in _ONE_PROMPT},
    "--pool": _of(),
    "--output": _of(),
    "--pad-to": _of(ENCODES),
    "--language": _heads("sentence"),
    "--batch-size": _of(),
    "--activation-bits": _of(),
    "--dtype": _of(),
    "--device": _of(),
}

_MEASURING = ("--show", "--merge")

CALIBRATE: Mapping[str, Uses] = {
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
    "--overwrite": _of(needs=("--output",)),
    "--hessian": _of(without=_MEASURING),
    "--merge": _of(without=("--show",)),
    "--show": _of(),
    "--json": _of(),
    "--import": _of(*CONTINUING, ENCODES, without=_MEASURING),
    "--device": _of(without=_MEASURING),
}

_UNPACKING = ("--dequantize", "--plan")  # neither packs
_PACKING = _of(without=_UNPACKING)


def _part(*parts: str, of: tuple[Family, ...] = ()) -> Uses:
    return _of(*of, without=_UNPACKING, parts=parts)


_CALIBRATED = ("--sequential", "--target-bpw")

# What --dry-run writes nothing of is allowed beside it: it is put before the line of the run that it is of.
QUANTIZE: Mapping[str, Uses] = {
    "MODEL": _of(),
    "--output": _of(without=("--plan",)),
    "--bits": _PACKING,
    "--global-bits": _part("global"),
    "--local-bits": _part("local", "states"),
    "--encoder-bits": _part("encoder"),
    "--patcher-bits": _part("patcher", of=CONTINUING),
    "--hash-bits": _part("hash", of=CONTINUING),
    "--decoder-bits": _part("decoder", of=(*CONTINUING, ANSWERS)),
    "--cross-bits": _part("cross", of=(ANSWERS,)),
    "--wo-bits": _part("encoder", "decoder"),
    "--kv-bits": _of(*CONTINUING, ANSWERS, without=("--dequantize",)),
    "--balance-keys": _of(*CONTINUING, ANSWERS, needs=("--stats",), without=_UNPACKING),
    "--global-format": _part("global"),
    "--local-format": _part("local", "states"),
    "--group-size": _PACKING,
    "--stats": _of(without=(*_UNPACKING, "--sequential")),  # with --method rtn too: errors are of the outputs then
    "--method": _PACKING,
    "--domain-weight": _of(needs=("--stats", "--sequential"), without=_UNPACKING),
    "--sequential": _PACKING,
    "--sequential-bytes": _of(needs=("--sequential",)),
    "--target-bpw": _of(*PREDICTS, without=_UNPACKING),
    "--save-recipe": _of(*PREDICTS, needs=("--target-bpw",)),
    "--calibration-corpus": _of(needs=_CALIBRATED, without=("--calibration-pairs",)),
    "--calibration-pairs": _of(*ENCODER_FIRST, needs=_CALIBRATED),
    "--distill-steps": _of(*PREDICTS, without=_UNPACKING),
    "--distill-corpus": _of(*PREDICTS, needs=("--distill-steps",), without=("--distill-pairs",)),
    "--distill-pairs": _of(ANSWERS, needs=("--distill-steps",)),
    "--recipe": _PACKING,
    "--override": _PACKING,
    "--report": _of(without=(*_UNPACKING, "--dry-run")),
    "--measure": _of(*PREDICTS, without=(*_UNPACKING, "--dry-run", "--export")),
    "--push": _of(needs=("--output",), without=("--plan", "--dry-run")),
    # Nothing but marlin would read texts' networks so, and transformers take one for a CANINE of its own without weights.
    "--export": _of(*READS_BYTES, without=_UNPACKING),
    "--dry-run": _of(without=("--plan",)),
    "--plan": _of(),
    "--bandwidth": _of(needs=("--plan",)),
    "--dequantize": _of(without=("--plan",)),
    "--overwrite": _of(needs=("--output",)),
    "--import": _of(*CONTINUING, ENCODES),
    "--json": _of(),
}

_NOTHING_RUN = ("--kernels", "--compare")
_NOT_MEASURED = (*_NOTHING_RUN, "--plan", "--surprise")
_ONE_TABLE = ("--formats",)  # of one model packed in memory, and of nothing else
_NOT_TIMED = (*_NOT_MEASURED, "--no-throughput")
_SCORED = ("--quality", "--formats")
_IN_STREAMS = ("--window",)  # a file is a stream then, whose bytes are scored once, in their order, and beside nothing else

BENCH: Mapping[str, Uses] = {
    "MODEL": _of(without=("--compare",)),
    "--prompt-bytes": _of(without=_NOT_TIMED),
    "--decode-bytes": _of(*CONTINUING, ANSWERS, without=_NOT_TIMED),
    "--repeats": _of(without=_NOT_TIMED),
    "--seconds": _of(*CONTINUING, without=(*_NOT_TIMED, *_ONE_TABLE)),
    "--roofline": _of(*CONTINUING, without=(*_NOT_TIMED, *_ONE_TABLE)),
    "--no-throughput": _of(without=_NOT_MEASURED),
    "--formats": _of(*PREDICTS, without=_NOT_MEASURED),
    "--details": _of(*CONTINUING, needs=("--quality",), without=(*_NOT_MEASURED, *_ONE_TABLE)),
    "--quality": _of(*PREDICTS, without=_NOT_MEASURED),
    "--reference": _of(*PREDICTS, needs=("--quality",), without=(*_ONE_TABLE, *_IN_STREAMS)),
    "--window-bytes": _of(*CONTINUING, ENCODES, needs=_SCORED, without=_IN_STREAMS),
    "--stride-bytes": _of(*CONTINUING, needs=_SCORED, without=_IN_STREAMS),
    "--max-bytes-per-file": _of(*CONTINUING, needs=_SCORED),
    "--max-quality-bytes": _of(*PREDICTS, needs=_SCORED, without=_IN_STREAMS),
    "--window": _of(*CONTINUING, needs=("--quality", "--surprise"), without=_ONE_TABLE),
    "--sinks": _of(CONTINUES, needs=_IN_STREAMS),
    "--sparse": _of(CONTINUES, without=(*_NOTHING_RUN, "--plan", "--no-throughput", *_ONE_TABLE), unless=_IN_STREAMS),
    "--surprise": _of(*CONTINUING, without=(*_NOTHING_RUN, "--plan", *_ONE_TABLE)),
    "--top": _of(*CONTINUING, needs=("--surprise",)),
    # Without a beginning it begins, as in calibrate. Of files that are streams nothing is kept.
    "--resume": _of(
        *CONTINUING, needs=("--quality", "--surprise"), without=(*_ONE_TABLE, *_IN_STREAMS), unless=("--surprise",)
    ),
    "--reference-cache": _of(*CONTINUING, needs=("--reference",)),
    "--language": _heads("sentence", without=_NOT_MEASURED),
    # What continues bytes is scored without a cache, but for streams; answers read one.
    "--kv-bits": {
        **_of(*CONTINUING, without=(*_NOTHING_RUN, "--no-throughput", *_ONE_TABLE), unless=_IN_STREAMS),
        ANSWERS: Use(without=(*_NOT_MEASURED, *_ONE_TABLE)),
    },
    "--k-bits": _of(*CONTINUING, without=(*_NOTHING_RUN, "--no-throughput", *_ONE_TABLE), unless=_IN_STREAMS),
    "--v-bits": _of(*CONTINUING, without=(*_NOTHING_RUN, "--no-throughput", *_ONE_TABLE), unless=_IN_STREAMS),
    "--activation-bits": _of(without=("--compare", "--plan")),
    "--kernels": _of(without=("--compare", "--plan")),
    "--format": _of(without=("--kernels", "--plan")),
    "--output": _of(without=("--kernels", "--plan")),
    "--report": _of(without=(*_NOT_MEASURED, *_ONE_TABLE)),
    "--plot": _of(without=(*_NOT_MEASURED, *_ONE_TABLE)),
    "--chart": _of(needs=("--plot",)),
    "--import": _of(*CONTINUING, ENCODES, without=("--compare",)),
    "--device": _of(without=("--compare",)),
    "--against": _of(*CONTINUING, without=(*_NOT_TIMED, *_ONE_TABLE)),
    "--save": _of(without=(*_NOT_MEASURED, *_ONE_TABLE)),
    "--compare": _of(),
    "--plan": _of(*CONTINUING, without=("--compare",)),
    "--speculate": _of(
        CONTINUES,
        ANSWERS,
        without=(
            "--compare",
            "--plan",
            "--kernels",
            "--against",
            "--context",
            "--batch",
            "--quality",
            "--seconds",
            "--roofline",
            "--report",
            "--plot",
            "--save",
            "--format",
            "--output",
            "--surprise",
            *_ONE_TABLE,
        ),
    ),  # fmt: skip
    "--prompt-file": _of(CONTINUES, ANSWERS, needs=("--speculate",)),  # whatever --prompt-bytes says
    "--context": _of(*CONTINUING, without=(*_NOTHING_RUN, "--surprise", "--no-throughput", *_ONE_TABLE)),
    "--batch": _of(without=(*_NOT_TIMED, *_ONE_TABLE)),
    "--bits": _of(*CONTINUING, needs=("--plan",)),
    "--bandwidth": _of(*CONTINUING, needs=("--plan",)),
    "--split": _of(
        CONTINUES, ANSWERS, needs=("--quality",), without=("--resume", "--reference-cache", *_IN_STREAMS, *_ONE_TABLE)
    ),
    "--ranks": _of(CONTINUES, needs=("--plan",)),
    "--link": _of(CONTINUES, needs=("--ranks",)),
}

SERVE: Mapping[str, Uses] = {
    "MODEL": _of(*CONTINUING, ANSWERS),
    **dict.fromkeys(("--host", "--port", "--name"), _of()),
    "--api-key": _of(without=("--api-key-file",)),
    "--api-key-file": _of(without=("--api-key",)),
    **dict.fromkeys(("--max-streams", "--max-waiting", "--cache-memory", "--drain-seconds", "--rows", "--kv-bits"), _of()),
    "--speculate": _of(CONTINUES, ANSWERS),
    "--window": _of(*CONTINUING, without=("--state-memory", "--state-folder")),
    "--sinks": _of(CONTINUES, needs=("--window",)),
    "--state-memory": _of(*CONTINUING),
    "--state-folder": _of(*CONTINUING),
    "--k-bits": _of(*CONTINUING),
    "--v-bits": _of(*CONTINUING),
    "--activation-bits": _of(),
    "--import": _of(CONTINUES),
    "--split": _of(CONTINUES, ANSWERS),
    "--device": _of(),
}

INFO: Mapping[str, Uses] = {
    "MODEL|FILE": _of(),
    "--fingerprint": _of(needs=("MODEL|FILE",)),
    "--json": _of(),
    "--import": _of(CONTINUES, ENCODES, needs=("MODEL|FILE",)),
    "--device": _of(),
}

MODELS = ("MODEL", "MODEL|FILE")  # the arguments whose families a command serves

USES: Mapping[str, Mapping[str, Uses]] = {
    "calibrate": CALIBRATE,
    "quantize": QUANTIZE,
    "generate": GENERATE,
    "label": LABEL,
    "encode": ENCODE,
    "serve": SERVE,
    "bench": BENCH,
    "info": INFO,
}
