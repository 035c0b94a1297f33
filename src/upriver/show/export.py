"""The user's own records with their scores, or those left when some are dropped: what comes after a trace or an audit."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.errors import ConfigError, InputError, StorageError
from upriver.runtime.artifact import atomic, check, load_json, refuse_inside
from upriver.runtime.config import SELF
from upriver.show.audit import Audit
from upriver.show.folder import read_columns, read_results
from upriver.show.records import scored_records, shown_unit
from upriver.text.corpus import Corpus
from upriver.text.reading import Reading
from upriver.text.records import BadRecords, dump, jsonable, open_corpus, whole
from upriver.text.sources import rows

PREFIX = "influence:"  # of the columns with scores
SELF_INFLUENCE = "self_influence"  # what --keep and --drop may go by as well
CHUNK = 4096  # records that are written at once
EXECUTED = ("=", "+", "-", "@", "\t", "\r")  # cells that a spreadsheet would run begin so
Json = dict[str, Any]
Rows = Callable[[], Iterator[Json]]


class Records(NamedTuple):
    """Records and what was found of them: which are the same by their key."""

    read: Callable[[], Iterator[tuple[Any, Json, Json]]]  # key, the record as it was, and with its columns
    frame: pd.DataFrame  # a row for each record that something is known of, by key
    usual: str | None  # what is gone by where nothing is said


def export(
    results: str | Path,
    out: str | Path,
    *,
    corpus: str | Path | Corpus | None = None,
    keep: str | None = None,
    drop: str | None = None,
    by: str | Sequence[str] | None = None,
    lowest: bool = False,
) -> Path:
    """Write the records that a trace scored or an audit ranked, every field as it was, in their order.

    With neither ``keep`` nor ``drop`` each record of a trace gets a field ``influence:ID`` for every column of the scores: what
    one more copy of it would change, in nats, calibrated where the trace measured the scale (with gradient
    dot products, which are in no unit, the dot product); null where nothing of it was scored.  Each of an audit gets its columns.
    With one of them the records are written as they were, ready to train on.

    Args:
        results: the folder of a trace or of an audit.
        out: a ``.jsonl``, ``.parquet`` or ``.csv`` file that is not there yet.
        corpus: where the records are now, or the corpus itself; None: where the trace read them (an audit keeps its own).
        keep: so many records (``100``) or such a share (``0.1``, ``10%``) with the largest scores.
        drop: as ``keep``, but all others.
        by: what ``keep`` and ``drop`` go by: a question or a set, several (the mean of their influence), or ``self_influence``
            (of a trace with ``--unit-norm``); of an audit one of its columns, by default ``suspicion``.  May be left
            out where there is one question.
        lowest: the smallest scores instead of the largest.

    Raises:
        ConfigError: an option, or a file that is there.
        MismatchError: the records are not those that were scored.
        InputError: the results are not of a corpus of text.

    Example:
        >>> up.export("scores", "clean.jsonl", drop="1%", by="q1")
    """
    path, place = Path(results), Path(out)
    write = WRITERS.get(place.suffix.lower())
    if write is None:
        raise ConfigError(f"bad value for --out: got {str(out)!r}; give a file that ends in {', '.join(WRITERS)}")
    if place.exists():
        raise ConfigError(
            f"bad value for --out: got {str(out)!r}, which is there; choose another file, or move it away"
        )
    refuse_inside(place)
    names = [by] if isinstance(by, str) else list(by or ())
    records = _audited(path) if _is_audit(path) else scored(path, corpus, SELF_INFLUENCE in names)
    if keep is None and drop is None:
        if names or lowest:
            raise ConfigError(
                "--by and --lowest say which records --keep or --drop means: got neither; give one of them"
            )
        write(place, lambda: (row for _, _, row in records.read()))
    else:
        chosen, wanted = _chosen(records, keep, drop, names, lowest), keep is not None
        write(place, lambda: (row for key, row, _ in records.read() if (key in chosen) == wanted))
    return place


def scored(path: Path, corpus: str | Path | Corpus | None, own: bool = False) -> Records:
    """The records of a trace, by the id of their documents, with the influence of each.

    Args:
        own: with their self-influence as well, which no field tells.

    Raises:
        ConfigError: the trace did not measure self-influence.
    """
    manifest, queries = read_results(path)
    read = scored_records(path, manifest, corpus)
    documents = read_columns(path / "documents.parquet", None)
    columns = [name for name in documents.columns if name not in ("document", "sequences")]
    unit = shown_unit(manifest, queries, columns)
    frame: Any = documents.set_index("document")[columns] * unit
    sequences = read_columns(path / "scores.parquet", ["document", "part", *columns])
    sums: Any = sequences.groupby(["document", "part"], sort=False)[columns].sum()  # of each record
    values = dict(zip(sums.index, sums.to_numpy(float) * unit, strict=True))
    names, nothing = [PREFIX + name for name in columns], [None] * len(columns)
    if own and SELF_INFLUENCE not in columns:
        found = read_columns(path / "scores.parquet", ["document", SELF])
        if SELF not in found:
            raise ConfigError(
                f"no self-influence in {path}: got --by {SELF_INFLUENCE}; trace again with --unit-norm, or give an audit"
            )
        frame[SELF_INFLUENCE] = found.groupby("document")[SELF].sum()

    def both() -> Iterator[tuple[Any, Json, Json]]:
        for record in read():
            of_record = values.get((record.id, record.part))
            told = zip(names, nothing if of_record is None else of_record.tolist(), strict=True)
            yield record.id, record.row, record.row | dict(told)

    return Records(both, frame, columns[0] if len(columns) == 1 else None)


def _is_audit(path: Path) -> bool:
    try:
        return load_json(path / "key.json").get("stage") == "audit"
    except (OSError, ValueError, AttributeError, StorageError):
        return False


def _audited(path: Path) -> Records:
    """The records of an audit, which it holds itself, by their number."""
    audit = Audit(path)
    named = audit.manifest["audit"]["columns"]
    file = next((x for x in (path / "records.jsonl", path / "records.parquet") if x.exists()), None)
    if file is None:
        raise InputError(f"the audit in {path} is not of records: its rows are your own examples, in your order")
    check(file)
    added = set(named.values())

    def read() -> Iterator[tuple[Any, Json, Json]]:
        found = (row for source in open_corpus([file], BadRecords(), Reading()) for _, row in rows(source))
        for number, row in enumerate(found):
            assert isinstance(row, dict)
            yield number, {name: x for name, x in row.items() if name not in added}, row

    return Records(read, audit.frame().set_index("row").dropna(axis=1, how="all"), "suspicion")


def _chosen(records: Records, keep: str | None, drop: str | None, by: list[str], lowest: bool) -> set[Any]:
    """The keys of the records with the largest or the smallest scores."""
    columns = list(records.frame.columns)
    if keep is not None and drop is not None:
        raise ConfigError(f"--keep and --drop exclude each other: got {keep!r} and {drop!r}; give one of them")
    if not by and records.usual is None:
        raise ConfigError(
            f"which question shall choose: got {len(columns)} columns; give --by one or more of {', '.join(columns[:8])}"
        )
    if unknown := [name for name in by if name not in columns]:
        raise ConfigError(f"bad value for --by: got {unknown[0]!r}; give one of {', '.join(columns[:8])}")
    flag = "--keep" if keep is not None else "--drop"
    count = _count(str(keep if keep is not None else drop), len(records.frame), flag)
    values = records.frame[by or [str(records.usual)]].mean(axis=1, skipna=False)
    return set(values.sort_values(ascending=lowest, kind="stable").head(count).index)


def _count(text: str, of: int, flag: str) -> int:
    """``100``, ``0.1`` or ``10%``."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    share = text.endswith("%") or "." in text
    if not (0 < number < 1 if share else number >= 1 and number == int(number)):
        raise ConfigError(
            f"bad value for {flag}: got {text!r}; give a number of records from 1, or a share such as 0.1 or 10%"
        )
    return min(of, round(number * of) if share else int(number))


# ---- forms


def _write_jsonl(place: Path, rows: Rows) -> None:
    with atomic(place) as temporary, open(temporary, "wb") as sink:
        for row in rows():
            sink.write(dump(jsonable(row)))


def _write_parquet(place: Path, rows: Rows) -> None:
    """Read twice: a column's type is known when all its values have been seen."""
    schema = pa.schema([])
    try:
        for chunk in _chunks(rows()):
            seen = pa.Table.from_pylist(chunk).schema if chunk else schema
            schema = pa.unify_schemas([schema, seen], promote_options="permissive")
        with atomic(place) as temporary, pq.ParquetWriter(temporary, schema) as sink:
            for chunk in _chunks(rows()):
                names = dict.fromkeys(schema.names)
                sink.write_table(pa.Table.from_pylist([names | row for row in chunk], schema=schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"a field holds several types or broken characters, which Parquet cannot ({what}); give --out a .jsonl file"
        ) from error


def _write_csv(place: Path, rows: Rows) -> None:
    names: dict[str, None] = {}
    for row in rows():
        names |= dict.fromkeys(row)
    with atomic(place) as temporary, open(temporary, "w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(map(_cell, names))
        for row in rows():
            writer.writerow([_cell(row.get(name)) for name in names])


def _cell(value: Any) -> Any:
    """What a spreadsheet shows and does not run."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = whole(value if isinstance(value, str) else json.dumps(jsonable(value), ensure_ascii=False))
    return "'" + text if text.startswith(EXECUTED) else text


def _chunks(rows: Iterator[Json]) -> Iterator[list[Json]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
}
