"""The rows of .jsonl, .parquet and hub datasets as bytes: text as its UTF-8 bytes, binary as it is.

Local tables are read here and not by `datasets`, whose JSON reader turns strings that look like dates into dates and
refuses lone surrogates, and whose Parquet reader holds whole row groups.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from marlin_cli.corpus.columns import Held, TextColumns, find_only_column, held_by_row, held_by_schema
from marlin_cli.corpus.lines import lines_of
from marlin_cli.corpus.packed import PACKED_SUFFIXES, packing_by_beginning
from marlin_cli.corpus.pages import is_encrypted, largest_page
from marlin_cli.documents import parse_json
from marlin_cli.errors import CorpusError
from marlin_cli.text import one_line, quoted

PARQUET_SUFFIX = ".parquet"

# Rows of JSON, a line each. A plain .json is no table: most are one document, and raw bytes like any other file.
LINES_SUFFIXES = (
    *(plain + packing for plain in (".jsonl", ".ndjson") for packing in ("", *PACKED_SUFFIXES)),
    *(".json" + packing for packing in PACKED_SUFFIXES),
)
TABLE_SUFFIXES = (*LINES_SUFFIXES, PARQUET_SUFFIX)

# How tables begin that lie under other names: Parquet, the same encrypted, Arrow's own files.
TABLE_BEGINNINGS = {b"PAR1\x15": "a Parquet table", b"PARE": "an encrypted Parquet table", b"ARROW1\0\0": "an Arrow table"}
# How each message of a stream of Arrow's begins, which other bytes do too: it counts beside the name alone.
ARROW_STREAM = b"\xff\xff\xff\xff"

PARQUET_BUFFER_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 16
LARGE_PAGE_BYTES = 8 << 20  # rows of a column with such pages are taken one by one: each may be as large
MOST_FOOTER_BYTES = 16 << 20


def is_table(path: Path) -> bool:
    """Does the file hold rows, by its name?"""
    return path.name.lower().endswith(TABLE_SUFFIXES)


def is_parquet(path: Path) -> bool:
    """Is the table a Parquet file, by its name?"""
    return path.name.lower().endswith(PARQUET_SUFFIX)


def held_by_lines(path: Path, lines: IO[bytes]) -> Iterator[tuple[str, dict[str, Held]]]:
    """(where, what is held) of each row of JSON, for `find_only_column`; errors as `rows_of_lines`."""
    for where, row in _rows_of_json(path, lines):
        yield where, held_by_row(row)


def rows_of_lines(path: Path, lines: IO[bytes], columns: TextColumns) -> Iterator[bytes]:
    """The text of each line that has some; of a key that comes twice in it, the last, as JSON's readers have it.

    Memory: the longest line.

    Raises:
        CorpusError: a line that is no JSON object, is too long, or whose text is no text.
    """
    for where, row in _rows_of_json(path, lines):
        name = columns.choose(where, held_by_row({name: row[name] for name in columns.names if name in row}))
        columns.count(where, 1, int(name is None))
        if name is not None:
            yield _bytes(row[name])


def held_by_parquet(path: Path) -> Iterator[tuple[str, dict[str, Held]]]:
    """(where, what is held) of the file, for `find_only_column`; errors as `rows_of_parquet`."""
    with _parquet(path) as table:
        yield str(path), held_by_schema(table.schema_arrow)


def rows_of_parquet(path: Path, columns: TextColumns) -> Iterator[bytes]:
    """The bytes of each row that has some. Memory: a page and the rows of one batch, of one column.

    Raises:
        CorpusError: no parquet file, a damaged one, one that cannot be read, or a column of another type.
        OSError: it cannot be opened.
    """
    with _parquet(path) as table:
        schema = table.schema_arrow
        name = columns.choose(str(path), held_by_schema(schema))
        if name is None:
            columns.count(str(path), table.metadata.num_rows, table.metadata.num_rows)
            return
        if schema.names.count(name) > 1:
            raise CorpusError(f"{path}: has {schema.names.count(name)} columns {quoted(name)}; leave one")
        for number, value in enumerate(_values(table, name, path), start=1):
            columns.count(f"{path}: row {number}", 1, int(not value.is_valid))
            if value.is_valid:
                yield _bytes_of_scalar(value)


def _values(table: Any, name: str, path: Path) -> Iterator[Any]:
    """The Arrow scalars of a column that is no nested one, a row group at a time."""
    place = next(number for number in range(len(table.schema)) if table.schema.column(number).path == name)
    with path.open("rb") as file:
        for group in range(table.num_row_groups):
            largest = largest_page(file, table.metadata.row_group(group).column(place), path)
            rows = PARQUET_BATCH_ROWS if largest <= LARGE_PAGE_BYTES else 1
            for batch in table.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False):
                yield from batch.column(0)


def rows_of_hub(hub: str) -> Iterator[bytes]:
    """The bytes of each row of the hub dataset `name[/config][@split]` (split `train` without one) that has some.

    A dataset that declares no columns is read once more, from its beginning to the first row that has text.

    Raises:
        CorpusError: it cannot be found or fetched, or has no column to take.
    """
    import datasets

    location, _, split = hub.partition("@")
    owner, _, rest = location.partition("/")
    name, _, config = rest.partition("/")
    where = f"hf:{hub}"
    try:
        rows = datasets.load_dataset(
            f"{owner}/{name}" if name else owner, config or None, split=split or "train", streaming=True
        )
        if rows.features is None:
            columns = TextColumns(find_only_column((where, held_by_row(row)) for row in rows))
        else:
            held = held_by_schema(rows.features.arrow_schema)
            columns = TextColumns(find_only_column([(where, held)]))
            column = columns.choose(where, held)
            rows = rows.select_columns([column])
        for number, row in enumerate(rows, start=1):
            at = f"{where}: row {number}"
            column = columns.choose(at, held_by_row({name: row[name] for name in columns.names if name in row}))
            columns.count(at, 1, int(column is None))
            if column is not None:
                yield _bytes(row[column])
    except CorpusError:
        raise
    except Exception as error:
        # The library raises what the network and its many readers raise.
        raise CorpusError(f"{where}: the hub did not give it: {one_line(error)[:200]}") from None
    columns.report(where)


def refuse_disguised(path: Path, file: IO[bytes]) -> None:
    """See that raw bytes are no table under another name: text would be read between its lengths and numbers.

    Raises:
        CorpusError: they are.
    """
    head = file.peek(8)[:8]  # type: ignore[attr-defined]
    if path.suffix.lower() == ".arrow" and head.startswith(ARROW_STREAM):
        head = b"ARROW1\0\0"  # as `datasets` writes them
    for beginning, what in TABLE_BEGINNINGS.items():
        if head.startswith(beginning):
            raise CorpusError(
                f"{path}: is {what}, which is read from unpacked .parquet files alone;"
                " write it as one, or name it binary= to take its bytes as they lie"
            )


def _rows_of_json(path: Path, lines: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    head = lines.peek(8)[:8]  # type: ignore[attr-defined]
    packing = packing_by_beginning(head)
    if packing is not None:
        raise CorpusError(f"{path}: holds {packing} data, not lines of JSON; end its name in {packing}")
    for where, line in lines_of(lines, str(path), CorpusError):
        try:
            row = parse_json(line, where, CorpusError)
        except CorpusError as error:
            if line.strip() in (b"[", b"{"):
                raise CorpusError(f"{where}: begins a document over several lines; write one JSON object a line") from None
            raise error from None
        if isinstance(row, list):
            raise CorpusError(f"{where} is a list, not a JSON object; write its entries one a line")
        if not isinstance(row, dict):
            raise CorpusError(f"{where} is not a JSON object")
        yield where, row


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """A Parquet file; errors of opening and reading it are ours."""
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        _check_parquet(path, file)
        try:
            with pyarrow.parquet.ParquetFile(file, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as table:
                yield table
        # Its own errors, and those of names that are no UTF-8 and sizes that no number holds.
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            text = one_line(error)
            if "decrypt" in text.lower():
                raise CorpusError(f"{path}: is encrypted; write it without encryption") from None
            raise CorpusError(f"{path}: damaged parquet file: {text[:200]}") from None


def _check_parquet(path: Path, file: IO[bytes]) -> None:
    size = os.fstat(file.fileno()).st_size
    head = file.read(4)
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    file.seek(0)
    if b"PARE" in (head, tail[4:]):
        raise CorpusError(f"{path}: is encrypted; write it without encryption")
    if head != b"PAR1":
        raise CorpusError(f"{path}: is no parquet file, for it begins with {quoted(head)}; name it after what it is")
    if size < 12 or tail[4:] != b"PAR1":
        raise CorpusError(f"{path}: damaged parquet file: it is cut short, and its end with the schema is missing")
    footer = int.from_bytes(tail[:4], "little")
    if footer > min(MOST_FOOTER_BYTES, size - 12):
        raise CorpusError(f"{path}: damaged parquet file: its end claims a schema of {footer:,} bytes")
    file.seek(size - 8 - footer)
    if is_encrypted(file.read(footer), path):
        raise CorpusError(f"{path}: is encrypted; write it without encryption")
    file.seek(0)


def _bytes_of_scalar(value: Any) -> bytes:
    """An Arrow scalar's own bytes: text is not decoded on the way."""
    import pyarrow

    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    return bytes(value.as_buffer())


def _bytes(value: str | bytes) -> bytes:
    # A lone surrogate of a JSON escape has three bytes, as WTF-8 has it.
    return value.encode("utf-8", errors="surrogatepass") if isinstance(value, str) else bytes(value)
