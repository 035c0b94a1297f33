"""JSON that is not one object a line: an array of records, or an object that holds one, read record by record.

However large the file is, at most one record of 16 MB is held, and a little of what stands behind it.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upriver.errors import CorpusError
from upriver.text.lines import LARGEST
from upriver.text.shapes import is_record

Row = dict[str, Any] | str
READ = 1 << 16  # characters that are taken at once at least
SPACE = " \t\r\n"


class BrokenError(Exception):
    """The text cannot be read on from record ``number`` on."""

    def __init__(self, number: int, why: str):
        super().__init__(why)
        self.number = number


class NotOneError(Exception):
    """The file is neither an array nor one object."""


def record_rows(path: Path, chunks: Iterator[bytes], split: str | None) -> Iterator[tuple[int, Row]]:
    """The records of a JSON array, or of the one list of records in a JSON object, numbered from 1.

    Args:
        chunks: the content of the file.
        split: the field whose list is meant, where an object has several.

    Raises:
        CorpusError: it is no JSON from some place on, or has several lists.
        NotOneError: it begins with an object that is not the whole of it, such as one a line.
    """
    try:
        yield from _records(chunks, split)
    except BrokenError as reason:
        raise CorpusError(f"{path}:{reason.number}: {reason}") from reason
    except UnicodeDecodeError as reason:
        byte = reason.object[reason.start]
        raise CorpusError(f"{path}: not UTF-8: got 0x{byte:02x}; save the file as UTF-8") from reason


def _records(chunks: Iterator[bytes], split: str | None) -> Iterator[tuple[int, Row]]:
    text = _Text(chunks)
    if text.peek() == "[":
        number = 0
        for number, row in _items(text, 0):
            yield number, row
        _check_end(text, number)
        return
    if text.peek() != "{":
        raise NotOneError
    try:
        found = text.value()
    except UnicodeDecodeError:
        raise
    except ValueError:
        if re.match(r"\s*\{[^\n]*\n\s*\{", text.text):  # objects line by line, of which the first is broken
            raise NotOneError from None
        yield from _fields(text, split)  # larger than a record may be, or broken
        return
    if text.peek():
        raise NotOneError
    yield from enumerate(_listed(found, split), 1)


def _listed(found: Any, split: str | None) -> list[Any]:
    """The records of an object that was read: itself, or its list of them."""
    if isinstance(found, str) or is_record(found):
        return [found]
    lists = {name: x for name, x in found.items() if isinstance(x, list) and x and all(isinstance(r, dict) for r in x)}
    if len(lists) > 1 and split not in (*lists, "all"):
        told = ", ".join(f"{name} ({len(x):,} records)" for name, x in lists.items())
        raise BrokenError(1, f"the object holds several lists of records: got {told}; say which with --split, or all")
    if split and split != "all":
        if split not in lists:
            raise BrokenError(
                1, f"no list of records is called {split!r}: got {', '.join(found)}; give another --split"
            )
        lists = {split: lists[split]}
    # without a list, its fields tell what is wrong
    return [row for rows in lists.values() for row in rows] or [found]


def _fields(text: "_Text", split: str | None) -> Iterator[tuple[int, Row]]:
    """The list of records in a large object, read as it goes by."""
    number, lists = 0, []
    text.take("{", 1)
    while True:
        name = _value(text, number + 1)
        if not isinstance(name, str):
            raise BrokenError(
                number + 1, f"broken JSON: got {name!r:.60} where the name of a field is expected; mend it"
            )
        text.take(":", number + 1)
        if text.peek() == "[":
            lists.append(name)
            if len(lists) > 1 and split is None:
                raise BrokenError(
                    number, f"the object holds several lists: got {', '.join(lists)}; say which with --split, or all"
                )
            for _, row in _items(text, number):
                if split in (None, "all", name):
                    number += 1
                    yield number, row
        else:
            _value(text, number + 1)
        if not text.follows("}", number):
            break
    _check_end(text, number)
    if not number:
        raise BrokenError(1, f"the object holds no such list of records: got the lists {', '.join(lists) or 'none'}")


def _items(text: "_Text", number: int) -> Iterator[tuple[int, Row]]:
    text.take("[", number)
    if text.peek() == "]":
        text.take("]", number)
        return
    while True:
        number += 1
        row = _value(text, number)
        yield number, row if isinstance(row, dict | str) else f"not a JSON object: got {row!r:.60}; give records"
        if not text.follows("]", number):
            return


def _value(text: "_Text", number: int) -> Any:
    try:
        return text.value()
    except UnicodeDecodeError:
        raise
    except ValueError as reason:
        what = f"broken JSON, or more than {LARGEST >> 20} MB of one record: {reason}"
        raise BrokenError(number, f"{what}; mend it, or write one JSON object a line") from reason


def _check_end(text: "_Text", number: int) -> None:
    if text.peek():
        raise BrokenError(number, f"something stands behind the end: got {text.peek()!r}; one file holds one array")


class _Text:
    """Text that is read on when it is needed."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.decoder = chunks, codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.twice = "", 0, ""
        self.json = json.JSONDecoder(parse_constant=lambda _: None, object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice = next(name for name in names if names.count(name) > 1)
        return found

    def more(self, size: int = READ) -> bool:
        parts, length = [self.text[self.at :]], 0
        while length < size and (chunk := next(self.chunks, None)) is not None:
            parts.append(self.decoder.decode(chunk))
            length += len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return length > 0

    def peek(self) -> str:
        """The next character that is no space; nothing at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, character: str, number: int) -> None:
        if self.peek() != character:
            raise BrokenError(number, f"broken JSON: got {self.peek()!r} where {character!r} is expected; mend it")
        self.at += 1

    def follows(self, end: str, number: int) -> bool:
        """Whether another item comes, and not the ``end``."""
        if self.peek() == end:
            self.at += 1
            return False
        self.take(",", number)
        return True

    def value(self) -> Any:
        """The next value; a sentence for an object in which a field stands twice.

        Raises:
            ValueError: it is broken, or too large.
        """
        self.peek()
        while True:
            self.twice = ""
            try:
                found, end = self.json.raw_decode(self.text, self.at)
            except RecursionError as reason:
                raise ValueError("nested too deeply") from reason
            except ValueError:
                if len(self.text) - self.at > LARGEST or not self.more(max(READ, len(self.text) - self.at)):
                    raise
                continue
            if end == len(self.text) and self.more():  # a number may go on
                continue
            if end - self.at > LARGEST:
                raise ValueError("too large")
            self.at = end
            if self.twice:
                return (
                    f"a JSON object has the field {self.twice!r} twice; which is meant cannot be known, leave one out"
                )
            return found
