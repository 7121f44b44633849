"""From the names of corpora to windows of raw bytes, streamed in bounded memory. Nothing is ever decoded."""

from marlin_cli.corpus.recipes import Recipe, RecipeSource, load_recipe
from marlin_cli.corpus.sources import Source, parse_source
from marlin_cli.corpus.stream import Corpus, Window, default_sequence_bytes, open_corpus

__all__ = [
    "Corpus",
    "Recipe",
    "RecipeSource",
    "Source",
    "Window",
    "default_sequence_bytes",
    "load_recipe",
    "open_corpus",
    "parse_source",
]
