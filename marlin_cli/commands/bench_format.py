"""The forms that `marlin bench` writes its result in."""

from enum import Enum


class Format(str, Enum):
    """How the result is written."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    md = "md"
