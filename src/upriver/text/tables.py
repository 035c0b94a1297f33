"""Tables become rows here: CSV by its separator, and Parquet.

A row is a dictionary of the fields that its header names, or a sentence that says why it is none.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from upriver.errors import CorpusError
from upriver.text.lines import LARGEST, READ, TOO_LARGE, UNREADABLE, File, LongLine, damaged, not_utf8, read_lines

Row = dict[str, Any] | str
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SAMPLE = 100, 1 << 16  # lines and bytes of a file that its separator is told by
BATCH = 256  # rows of Parquet that are read at once, at most
UNFOLDS = 128 << 20, 100  # bytes of a column that are no matter, and how many times its size in the file is taken


class Table(File, Protocol):
    """A file of a table."""

    separator: str  # of its cells, noted when it is known

    @property
    def size(self) -> int: ...


# ---- CSV


class _TooLargeError(Exception):
    """A row holds more than fits."""


class _Feed:
    """The lines of a file for `csv.reader`, which stops within a row that is too large."""

    def __init__(self, lines: Iterator[tuple[int, bytes | LongLine]]):
        self.lines, self.line = lines, 0
        self.first = self.bytes = self.quotes = 0  # the line that the row begins on, and what was read of it
        self.unread: LongLine | bool = False  # more of it than fits

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        self.line, content = next(self.lines)
        self.first = self.first or self.line
        if isinstance(content, LongLine):
            self.unread = content
            raise _TooLargeError
        self.quotes += content.count(b'"')
        self.bytes += len(content)
        if self.bytes > LARGEST:
            self.unread = True
            raise _TooLargeError
        return content.decode(errors="surrogateescape")

    def begin(self) -> None:
        """Begin a row, behind what is left of one that is too large: a row ends where the number of its quotes is even."""
        for line, content in self.lines if self.unread else ():
            if isinstance(self.unread, LongLine):  # all of it was read for this line
                self.quotes += self.unread.quotes
            self.unread = content if isinstance(content, LongLine) else True
            if self.quotes % 2 == 0:
                self.lines = chain([(line, content)], self.lines)
                break
            self.quotes += 0 if isinstance(content, LongLine) else content.count(b'"')
        self.first = self.bytes = self.quotes = 0
        self.unread = False


def csv_rows(source: Table, separator: str = "") -> Iterator[tuple[int, Row]]:
    """Read the rows of a CSV file with the lines that they begin on; its first rows tell the separator that was not given.

    Raises:
        CorpusError: the file is damaged, or its header or separator cannot be told.
    """
    lines = read_lines(source)
    limit = csv.field_size_limit(LARGEST)
    try:
        if not separator:
            separator, lines = _told(source, lines)
        source.separator = separator
        feed = _Feed(lines)
        reader = csv.reader(feed, strict=True, delimiter=separator)
        names = _header(_cells(reader, feed), f"{source.path}:{feed.first}")
        while (cells := _cells(reader, feed)) is not None:
            if isinstance(cells, str):
                yield feed.first, cells
            elif cells and len(cells) != len(names):
                fault = f"broken CSV: got {len(cells)} cells, the header has {len(names)}"
                yield feed.first, f"{fault}; quote cells that hold a {SEPARATORS[separator]}"
            elif cells:
                yield feed.first, dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _cells(reader: Iterator[list[str]], feed: _Feed) -> list[str] | str | None:
    """Read the cells of the next row, or say why it has none; the reader then goes on with the next line."""
    feed.begin()
    try:
        cells = next(reader, None)
    except _TooLargeError:
        return TOO_LARGE
    except csv.Error as reason:
        if "new-line" in str(reason):
            return "broken CSV: got a carriage return inside a line; end lines with LF or CRLF, or quote the cell"
        return f"broken CSV: {reason}; close every quote that is opened"
    escaped = re.search("[\udc80-\udcff]", "".join(cells or []))
    if escaped:
        return not_utf8(ord(escaped[0]) - 0xDC00, f"character {escaped.start() + 1} of the row")
    return cells


def _header(cells: list[str] | str | None, where: str) -> list[str]:
    """The names of the columns; those without one are numbered where there are several."""
    if isinstance(cells, str):
        raise CorpusError(f"{where}: the header cannot be used: {cells}")
    nameless = (cells or []).count("") > 1
    names = [name or (f"column {n}" if nameless else "") for n, name in enumerate(cells or [], 1)]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise CorpusError(f"{where}: two columns have the name {twice!r}; which is meant cannot be known, rename one")
    return names


def _told(source: Table, lines: Iterator[tuple[int, Any]]) -> tuple[str, Iterator[tuple[int, Any]]]:
    """Tell the separator of a CSV file by its first rows: it cuts them into as many cells as the header; and give all lines.

    Raises:
        CorpusError: it cannot be told.
    """
    sample, size = [], 0
    for line in lines:
        sample.append(line)
        size += 0 if isinstance(line[1], LongLine) else len(line[1])
        if len(sample) == SAMPLE[0] or size > SAMPLE[1]:
            break
    texts = [content.decode(errors="replace") for _, content in sample if not isinstance(content, LongLine)]
    if texts and (said := re.fullmatch(r'"?sep=([,;\t|])"?\s*', texts[0])):  # a line of Excel
        return said[1], chain(sample[1:], lines)
    fit = {}
    for separator in SEPARATORS:
        header, *rows = _sampled(texts, separator) or [[]]
        if len(header) > 1:
            fit[separator] = sum(len(row) == len(header) for row in rows) / len(rows) if rows else 0.0
    most = max(fit.values(), default=0.0)
    best = [separator for separator in fit if fit[separator] == most]
    if fit.keys() <= {","} or (len(fit) == 1 and len(texts) < 2):
        return next(iter(fit), ","), chain(sample, lines)
    if len(best) > 1 or most < 0.5:
        seen = ", ".join(f"{SEPARATORS[separator]} {share:.0%}" for separator, share in fit.items())
        raise CorpusError(
            f"{source.path}:1: which character separates the cells cannot be told: got a header that each of these cuts, and "
            f"this share of the rows into as many cells: {seen}; save the file with commas, its cells in quotes"
        )
    return best[0], chain(sample, lines)


def _sampled(texts: list[str], separator: str) -> list[list[str]]:
    """The rows that some lines of CSV hold, as far as they can be read."""
    rows = []
    try:
        for row in csv.reader(texts, strict=True, delimiter=separator):
            rows += [row] if row else []
    except csv.Error:  # a row that the sample does not hold to its end, or a broken one, of which more is said later
        pass
    return rows


# ---- Parquet


def parquet_rows(source: Table) -> Iterator[tuple[int, Row]]:
    """Read the rows of a Parquet file, few at once, with their numbers.

    Raises:
        CorpusError: the file is damaged, or two of its columns have one name.
    """
    row = 0
    try:
        with (
            open(source.path, "rb") as raw,
            pq.ParquetFile(raw, buffer_size=READ) as file,
        ):  # arrow takes some names for addresses
            twice = [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]
            if twice:
                raise CorpusError(f"{source.path}: two columns have the name {twice[0]!r}; rename or leave out one")
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                at_once, fault = _rows_at_once(facts)
                for _ in range(facts.num_rows if fault else 0):
                    row += 1
                    yield row, fault
                for batch in () if fault else file.iter_batches(at_once, [group]):
                    for value in _values(batch):
                        row += 1
                        yield row, value
                    source.read_bytes = source.size * row // max(1, file.metadata.num_rows)
    except UNREADABLE as reason:
        raise CorpusError(f"{source.path}:{row + 1}: {damaged(reason)}") from reason


def _rows_at_once(group: pq.RowGroupMetaData) -> tuple[int, str]:
    """Rows of a group that are read at once; or why it is not read, where it says that its cells are larger than what fits.

    A cell may be stored once for many rows, so that all rows of a batch may be as large as a column.
    """
    columns = [group.column(c) for c in range(group.num_columns)]
    largest = max((column.total_uncompressed_size for column in columns), default=0)
    if largest > group.num_rows * (LARGEST + READ):
        return 0, TOO_LARGE
    for column in columns:
        size = column.total_uncompressed_size
        if size > max(UNFOLDS[0], UNFOLDS[1] * column.total_compressed_size):
            times = size // max(1, column.total_compressed_size)
            return 0, (
                f"its row group is too large: got {size >> 20:,} MB in the column {column.path_in_schema!r}, {times:,} times "
                f"what it takes in the file; write the file again with row groups of at most {UNFOLDS[0] >> 20} MB"
            )
    return max(8, min(BATCH, (256 << 20) // max(1, largest))), ""


def _values(batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of a batch; one by one where they cannot be had all at once."""
    if batch.nbytes <= LARGEST:
        with suppress(
            ValueError, OverflowError, pa.ArrowException
        ):  # UTF-8 that is none, dates that Python does not have
            found = batch.to_pylist()
            yield from found
            return
    for n in range(batch.num_rows):
        one = batch.slice(n, 1)
        if one.nbytes > LARGEST:
            yield TOO_LARGE
            continue
        try:
            found = {}
            for name, column in zip(one.schema.names, one.columns, strict=True):
                found[name] = _value(column[0])
            yield found
        except UnicodeDecodeError as reason:
            yield not_utf8(reason.object[reason.start], f"byte {reason.start + 1} of a text in the column {name!r}")


def _value(cell: Any) -> Any:
    """A value of Arrow as Python has it; a date out of Python's range as its text."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, pa.ArrowException):
        if isinstance(cell, pa.StructScalar):
            return {name: _value(cell[name]) for name in cell.keys()}  # noqa: SIM118 - not a mapping
        if isinstance(cell, pa.ListScalar):
            return [_value(item) for item in cell.values]
        text = pc.cast(pa.array([cell]), pa.string())[0].as_py()
        unit = getattr(cell.type, "unit", "days")
        return f"{cell.value} {unit} after 1970-01-01" if text.startswith("<") else text
