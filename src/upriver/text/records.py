"""Rows become records here: the documents of a corpus are checked one by one as they stream by."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from upriver.errors import CorpusError
from upriver.text.batch import content_hash
from upriver.text.folders import canonical, split_of
from upriver.text.places import Places
from upriver.text.reading import Reading
from upriver.text.shapes import BadRowError, check_unicode, shaped
from upriver.text.shards import Shard
from upriver.text.sources import Source, find_sources, rows

LISTED = 20  # bad records that are described one by one; the rest are counted


@dataclass(frozen=True)
class Record:
    """A record is a document, or a part of one: records of one id that follow each other are the parts of one document."""

    id: str  # of the document
    part: int  # of it, from 0
    parts: dict[str, Any]  # what it is made of, as `Shape` says
    metadata: dict[str, Any]
    where: str  # file and line
    note: str = ""  # what is said of how it is read, once
    source: int = 0  # the number of its file
    row: dict[str, Any] = field(default_factory=dict, compare=False)  # as it stands in the file


@dataclass
class BadRecords:
    """Records that cannot be used are an error at once, or are counted and (the first ones) listed."""

    policy: str = "error"
    count: int = 0
    listed: list[dict[str, str]] = field(default_factory=list)

    def report(self, where: str, reason: str) -> None:
        if self.policy == "error":
            raise CorpusError(f"{where}: {reason}; or skip such records with --on-bad-record skip")
        self.count += 1
        if self.count <= LISTED:
            self.listed.append({"where": where, "reason": reason})


def open_corpus(
    paths: list[Path],
    bad: BadRecords,
    reading: Reading,
    shard: Shard | None = None,
    left_out: list[str] | None = None,
) -> list[Source]:
    """Find the files of a corpus; in a folder, files of an unknown type count as bad records.

    Args:
        shard: how tokens are read, where that is known.
        left_out: takes the names of files about the data, such as a README, and of other splits.

    Raises:
        CorpusError: nothing that can be read, or several splits of which none is named.
    """
    about: list[str] = []
    sources, skip = [], bad.report if bad.policy == "skip" else None
    for path in paths:
        found = find_sources(path, CorpusError, skip, reading.split, about)
        kept = found if found[0].kind == "dataset" else _of_split(path, found, reading.split)
        about += [source.name for source in found if source not in kept]
        sources += kept
    for source in sources if len(paths) > 1 else ():  # files of one name in several folders
        source.name = Path(os.path.relpath(source.path, _common(paths))).as_posix()
    for source in sources:
        source.shard, source.split = shard or source.shard, reading.split
    if left_out is not None:
        left_out += about
    return sources


def _common(paths: list[Path]) -> str:
    return os.path.commonpath([path.absolute().parent for path in paths])


def _of_split(path: Path, sources: list[Source], split: str | None) -> list[Source]:
    """The files of a split; all of them where there is one."""
    if sources[0].path == path:
        if split not in (None, "all") and sources[0].path.suffix.lower() != ".json":
            raise CorpusError(f"a file has no splits: got {path} and --split {split}; give --split all, or the folder")
        return sources
    groups: dict[str | None, list[Source]] = {}
    for source in sources:
        groups.setdefault(split_of(source.name, source.kind == "text"), []).append(source)
    known = [name for name in groups if name]
    if split == "all" or (split is None and len(known) < 2):
        return sources
    if split is None or canonical(split) not in known:
        told = ", ".join(f"{name or 'none'} ({_counted(some)})" for name, some in groups.items())
        raise CorpusError(
            f"which split of the data set is meant: got {told} in {path}; say it with --split"
            + (f", such as {'train' if 'train' in known else known[0]}, or all" if known else " all, or leave it out")
        )
    return groups[canonical(split)]


def _counted(sources: list[Source]) -> str:
    files = "1 file" if len(sources) == 1 else f"{len(sources):,} files"
    if len(sources) > LISTED or any(source.kind != "parquet" for source in sources):
        return files
    try:
        return f"{files}, {sum(pq.read_metadata(source.path).num_rows for source in sources):,} records"
    except (OSError, pa.ArrowException):
        return files


def read_records(sources: list[Source], bad: BadRecords, reading: Reading) -> Iterator[Record]:
    """Read all records of ``sources`` in order; one is in memory at a time.

    Raises:
        CorpusError: a file that is damaged; a record that cannot be used, unless these are skipped.
    """
    seen, last, part = Places(), "", 0
    for number, source in enumerate(sources):
        for line, row in rows(source):
            where = f"{source.path}:{line}"
            try:
                if isinstance(row, str):
                    raise BadRowError(row)
                shape, own = shaped(row, reading), _id(row, f"{source.name}:{line}")
                metadata = {name: jsonable(value) for name, value in row.items() if name not in (*shape.fields, "id")}
                place = seen.setdefault(content_hash(own.encode()), (number, line))
                first = place == (number, line)
                if not first and (own != last or place[0] != number):
                    raise BadRowError(
                        f"a second document with the id {own!r}; the first is at {sources[place[0]].path}:{place[1]}, give "
                        "each document its own, or the parts of one one after the other"
                    )
            except BadRowError as reason:
                bad.report(where, str(reason))
            except RecursionError:
                bad.report(where, "its metadata is nested too deeply; leave it out")
            else:
                last, part = own, 0 if first else part + 1
                yield Record(own, part, shape.parts, metadata, where, shape.note, number, row)


def _id(row: dict[str, Any], default: str) -> str:
    own = row.get("id")
    if own is None or own == "":
        return default
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise BadRowError(f"the field 'id' is not a text or a whole number: got {own!r:.60}")
    check_unicode("id", str(own))
    return str(own)


def jsonable(value: Any) -> Any:
    """Turn a value into one that JSON can hold: NaN and infinity become null, dates and the like their text."""
    if isinstance(value, dict):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return jsonable(value.tolist())
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


def whole(text: str) -> str:
    """Replace half of a surrogate pair, which UTF-8 cannot hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def dump(value: Any) -> bytes:
    """Write a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
