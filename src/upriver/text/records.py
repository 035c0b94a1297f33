"""Rows become records here: the documents of a corpus are checked one by one as they stream by."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upriver.errors import ConfigError, CorpusError
from upriver.text.batch import content_hash
from upriver.text.places import Places
from upriver.text.sources import Source, find_sources, rows

LISTED = 20  # bad records that are described one by one; the rest are counted
FORMS = (("text",), ("prompt", "completion"), ("messages",))


@dataclass(frozen=True)
class Record:
    """A record is a document; its ``parts`` are ``text``, or ``prompt`` and ``completion``, or ``messages``."""

    id: str
    parts: dict[str, Any]
    metadata: dict[str, Any]
    where: str  # file and line
    row: dict[str, Any] = field(default_factory=dict, compare=False)  # as it stands in the file


class BadRowError(Exception):
    """A row is not a record, or a record cannot become text; the message says why."""


@dataclass
class BadRecords:
    """Records that cannot be used are an error at once, or are counted and (the first ones) listed."""

    policy: str = "error"
    count: int = 0
    listed: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in ("error", "skip"):
            raise ConfigError(f"on_bad_record is 'error' or 'skip': got {self.policy!r}")

    def report(self, where: str, reason: str) -> None:
        if self.policy == "error":
            raise CorpusError(f"{where}: {reason}; or skip such records with upriver fit --on-bad-record skip")
        self.count += 1
        if self.count <= LISTED:
            self.listed.append({"where": where, "reason": reason})


def open_corpus(path: Path, bad: BadRecords) -> list[Source]:
    """Find the files of a corpus; in a folder, files of an unknown type count as bad records."""
    return find_sources(path, CorpusError, bad.report if bad.policy == "skip" else None)


def read_records(sources: list[Source], bad: BadRecords) -> Iterator[Record]:
    """Read all records of ``sources`` in order; one is in memory at a time.

    Raises:
        CorpusError: a file that is damaged; a record that cannot be used, unless these are skipped.
    """
    seen = Places()
    for number, source in enumerate(sources):
        for line, row in rows(source):
            where = f"{source.path}:{line}"
            try:
                if isinstance(row, str):
                    raise BadRowError(row)
                record = _record(row, where, f"{source.name}:{line}")
                file, first = seen.setdefault(content_hash(record.id.encode()), (number, line))
                if (file, first) != (number, line):
                    place = f"the first is at {sources[file].path}:{first}, give each document its own"
                    raise BadRowError(f"a second document with the id {record.id!r}; {place}")
            except BadRowError as reason:
                bad.report(where, str(reason))
            except RecursionError:
                bad.report(where, "its metadata is nested too deeply; leave it out")
            else:
                yield record


def _record(row: dict[str, Any], where: str, default_id: str) -> Record:
    form = next((form for form in FORMS if all(row.get(name) is not None for name in form)), None)
    if form is None:
        lack = {"prompt": "completion", "completion": "prompt"}
        missing = next((f"the field {lack[have]!r} is missing" for have in lack if row.get(have) is not None), None)
        missing = missing or f"the field 'text' is missing: got the fields {', '.join(map(repr, row)) or 'none'}"
        raise BadRowError(f"{missing}; a record has text, or prompt and completion, or messages")
    parts = {name: row[name] for name in form}
    if form == ("messages",):
        parts["messages"] = _messages(row["messages"])
        if row.get("tools"):
            parts["tools"] = _tools(row["tools"])
    else:
        for name, value in parts.items():
            if not isinstance(value, str):
                raise BadRowError(f"the field {name!r} is not a text: got {value!r:.60}")
            _check_unicode(name, value)
        if not parts[form[-1]].strip():
            raise BadRowError(f"the field {form[-1]!r} is empty: got {parts[form[-1]]!r:.60}")
    own = row.get("id")
    if own is None or own == "":
        own = default_id
    elif isinstance(own, bool) or not isinstance(own, str | int):
        raise BadRowError(f"the field 'id' is not a text or a whole number: got {own!r:.60}")
    else:
        _check_unicode("id", str(own))
    metadata = {name: jsonable(value) for name, value in row.items() if name not in (*parts, "id")}
    return Record(str(own), parts, metadata, where, row)


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRowError(f"the field 'messages' is not a list of objects: got {messages!r:.60}")
    for message in messages:
        called = message.get("role") == "assistant" and message.get("tool_calls")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str) and not (called and message.get(name) is None):
                raise BadRowError(f"a message has no text as its {name!r}: got {message!r:.60}")
            _check_unicode(name, message.get(name) or "")
    answers = [
        m for m in messages if m["role"] == "assistant" and ((m.get("content") or "").strip() or m.get("tool_calls"))
    ]
    if not answers:
        raise BadRowError("no message of the role 'assistant' has a content; its answer is what is learned")
    if not sum(taught(m) for m in answers):  # each is looked at
        raise BadRowError("every answer of the assistant has the weight 0; leave the record out")
    # a template may ask whether there is a content: it is there, and null, beside tool calls
    return [{name: x for name, x in m.items() if x is not None or name == "content"} for m in messages]


def taught(message: dict[str, Any]) -> bool:
    """Whether an answer carries loss: not with ``weight: 0`` or ``train: false``."""
    given = {name: message[name] for name in ("weight", "train") if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise BadRowError(f"the field {name!r} of a message is 0 or 1, or false or true: got {value!r:.60}")
    return all(given.values())


def _tools(tools: Any) -> list[Any]:
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise BadRowError(f"the field 'tools' is not a list of objects: got {tools!r:.60}")
    return found


def _check_unicode(name: str, value: str) -> None:
    if fault := half_pair(name, value):
        raise BadRowError(fault)


def jsonable(value: Any) -> Any:
    """Turn a value into one that JSON can hold: NaN and infinity become null, dates and the like their text."""
    if isinstance(value, dict):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def size_of(value: Any) -> int:
    """About how many characters a value holds, of whatever it is made."""
    if isinstance(value, dict):
        return sum(64 + len(name) + size_of(item) for name, item in value.items())
    if isinstance(value, list):
        return sum(16 + size_of(item) for item in value)
    return len(value) if isinstance(value, str) else 16


def half_pair(name: str, value: str) -> str | None:
    """Say what is wrong with a field that holds half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        return f"the field {name!r} holds half of a surrogate pair: got {half!r}; write both halves or neither"
    return None


def whole(text: str) -> str:
    """Replace half of a surrogate pair, which UTF-8 cannot hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def dump(value: Any) -> bytes:
    """Write a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
