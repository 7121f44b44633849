"""The rows of .jsonl, .parquet and hub datasets as bytes: text as its UTF-8 bytes, binary as it is.

Local tables are read here and not by `datasets`, whose JSON reader turns strings that look like dates into dates and
refuses lone surrogates, and whose Parquet reader holds whole row groups.
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from marlin_cli.documents import parse_json
from marlin_cli.errors import CorpusError
from marlin_cli.text import one_line

# Columns that are taken for a table's bytes, in order of preference.
COLUMNS = ("bytes", "content", "text")

PARQUET_BUFFER_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 16


def rows_of_jsonl(path: Path, lines: Iterable[bytes]) -> Iterator[bytes]:
    """The text of each line, null left out. Memory: the longest line.

    Raises:
        CorpusError: a line that is no JSON object, or holds no text where the first one did.
    """
    column = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}: line {number}", CorpusError)
        if not isinstance(row, dict):
            raise CorpusError(f"{path}: line {number} is not a JSON object")
        if column is None:
            column = _column_of_row(row, str(path))
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise CorpusError(f"{path}: line {number}: {column!r} is {type(value).__name__}, expected text")
        yield _bytes(value)


def rows_of_parquet(path: Path) -> Iterator[bytes]:
    """The bytes of each row, null left out. Memory: the pages and rows of one batch, of one column.

    Raises:
        CorpusError: a damaged file, or no column to take.
        OSError: it cannot be opened.
    """
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            with pyarrow.parquet.ParquetFile(file, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as table:
                schema = table.schema_arrow
                column = _column([field.name for field in schema if _holds_bytes(field.type)], schema.names, str(path))
                for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=[column], use_threads=False):
                    for value in batch.column(0):
                        if value.is_valid:
                            yield _bytes_of_scalar(value)
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(f"{path}: damaged parquet file: {one_line(error)[:200]}") from None


def rows_of_hub(hub: str) -> Iterator[bytes]:
    """The bytes of each row of the hub dataset `name[/config][@split]` (split `train` without one), null left out.

    Raises:
        CorpusError: it cannot be found or fetched, or has no column to take.
    """
    import datasets

    location, _, split = hub.partition("@")
    owner, _, rest = location.partition("/")
    name, _, config = rest.partition("/")
    try:
        rows = datasets.load_dataset(
            f"{owner}/{name}" if name else owner, config or None, split=split or "train", streaming=True
        )
        column = None
        if rows.features is not None:
            fitting = [name for name, feature in rows.features.items() if _is_value_of_bytes(feature)]
            column = _column(fitting, list(rows.features), f"hf:{hub}")
            rows = rows.select_columns([column])
        for row in rows:
            if column is None:
                column = _column_of_row(row, f"hf:{hub}")
            value = row.get(column)
            if value is not None:
                yield _bytes(value)
    except CorpusError:
        raise
    except Exception as error:
        # The library raises what the network and its many readers raise.
        raise CorpusError(f"hf:{hub}: the hub did not give it: {one_line(error)[:200]}") from None


def _column_of_row(row: dict[str, Any], where: str) -> str:
    """The column whose values are the bytes, from a first row; null may stand for text in a column of known name."""
    text = [name for name, value in row.items() if isinstance(value, (str, bytes))]
    return _column([*text, *(name for name in COLUMNS if name in row and row[name] is None)], list(row), where)


def _column(fitting: Collection[str], names: Collection[str], where: str) -> str:
    for name in COLUMNS:
        if name in fitting:
            return name
    if len(fitting) != 1:
        found = ", ".join(map(str, names)) or "no columns"
        if not fitting:
            raise CorpusError(f"{where}: no column holds text or bytes; found {found}")
        raise CorpusError(f"{where}: which column holds the bytes? Found {found}; name it text")
    return next(iter(fitting))


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pyarrow.types, f"is_{test}")(kind) for test in tests)


def _is_value_of_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "binary", "large_binary")


def _bytes_of_scalar(value: Any) -> bytes:
    """An Arrow scalar's own bytes: text is not decoded on the way."""
    import pyarrow

    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    return bytes(value.as_buffer())


def _bytes(value: str | bytes) -> bytes:
    # A lone surrogate of a JSON escape has three bytes, as WTF-8 has it.
    return value.encode("utf-8", errors="surrogatepass") if isinstance(value, str) else bytes(value)
