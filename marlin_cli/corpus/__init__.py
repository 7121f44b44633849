"""From the names of corpora to windows of raw bytes, to inputs with answers, or to texts. Bytes stay bytes."""

from marlin_cli.corpus.examples import CorruptedCorpus, Example, PairCorpus, open_pairs
from marlin_cli.corpus.pairs import Pair, read_pairs
from marlin_cli.corpus.recipes import Recipe, RecipeSource, load_recipe
from marlin_cli.corpus.sources import Source, parse_source
from marlin_cli.corpus.spans import SpanCorruption
from marlin_cli.corpus.stream import Corpus, Window, default_sequence_bytes, open_corpus
from marlin_cli.corpus.texts import Text, TextCorpus

__all__ = [
    "Corpus",
    "CorruptedCorpus",
    "Example",
    "Pair",
    "PairCorpus",
    "Recipe",
    "RecipeSource",
    "Source",
    "SpanCorruption",
    "Text",
    "TextCorpus",
    "Window",
    "default_sequence_bytes",
    "load_recipe",
    "open_corpus",
    "open_pairs",
    "parse_source",
    "read_pairs",
]
