"""The user's own records with their scores, or those that are left when some are dropped: what comes after a trace."""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.errors import ConfigError, InputError, MismatchError
from upriver.influence.results import calibration
from upriver.runtime.artifact import atomic, refuse_inside
from upriver.show.scores import Scores
from upriver.text.corpus import Corpus, corpus_digest
from upriver.text.reading import Reading
from upriver.text.records import BadRecords, dump, jsonable, open_corpus, read_records, whole
from upriver.text.shards import Shard
from upriver.text.sources import Source

PREFIX = "influence:"  # of the columns with scores
CHUNK = 4096  # records that are written at once
EXECUTED = ("=", "+", "-", "@", "\t", "\r")  # cells that a spreadsheet would run begin so
Json = dict[str, Any]
Rows = Callable[[], Iterator[Json]]


def export(
    scores: str | Path,
    out: str | Path,
    *,
    corpus: str | Path | Corpus | None = None,
    keep: str | None = None,
    drop: str | None = None,
    by: str | None = None,
    lowest: bool = False,
) -> Path:
    """Write the records that a trace scored, every field as it was, in their order.

    With neither ``keep`` nor ``drop`` each record gets a field ``influence:ID`` for every column of the scores: what one more
    copy of it would change, in nats, calibrated where the trace measured the scale (with gradient
    dot products, which are in no unit, the dot product); null where nothing of it was scored.
    With one of them the records are written as they were, ready to train on.

    Args:
        out: a ``.jsonl``, ``.parquet`` or ``.csv`` file that is not there yet.
        corpus: where the records are now, or the corpus itself; None: where the trace read them.
        keep: so many records (``100``) or such a share (``0.1``, ``10%``) with the largest scores.
        drop: as ``keep``, but all others.
        by: the column of the scores that ``keep`` and ``drop`` go by; may be left out where there is one.
        lowest: the smallest scores instead of the largest.

    Raises:
        ConfigError: an option, or a file that is there.
        MismatchError: the records are not those that were scored.
        InputError: the results are not of a corpus of text.

    Example:
        >>> up.export("scores", "clean.jsonl", drop="1%", by="q1")
    """
    result, place = Scores(scores), Path(out)
    write = WRITERS.get(place.suffix.lower())
    if write is None:
        raise ConfigError(f"bad value for --out: got {str(out)!r}; give a file that ends in {', '.join(WRITERS)}")
    if place.exists():
        raise ConfigError(
            f"bad value for --out: got {str(out)!r}, which is there; choose another file, or move it away"
        )
    refuse_inside(place)
    sources, skipping, reading = _sources(result, corpus)
    documents = result.documents()
    columns = [name for name in documents.columns if name not in ("document", "sequences")]
    if keep is None and drop is None:
        if by is not None or lowest:
            raise ConfigError(
                "--by and --lowest say which records --keep or --drop means: got neither; give one of them"
            )
        plain = result.manifest["damping"] == "none"
        scales = {} if plain else {x["id"]: calibration(x.get("solution")) for x in result.queries}
        unit = (1 if plain else result.manifest["n_train"]) / np.array([scales.get(name) or 1.0 for name in columns])
        sums: Any = result.frame().groupby(["document", "part"], sort=False)[columns].sum()  # of each record
        values = dict(zip(sums.index, sums.to_numpy(float) / unit, strict=True))
        names = [PREFIX + name for name in columns]
        nothing = [None] * len(names)

        def rows() -> Iterator[Json]:
            for record in read_records(sources, skipping(), reading):
                found = values.get((record.id, record.part))
                yield record.row | dict(zip(names, nothing if found is None else found.tolist(), strict=True))
    else:
        chosen = _chosen(documents, columns, keep, drop, by, lowest)

        def rows() -> Iterator[Json]:
            for record in read_records(sources, skipping(), reading):
                if (record.id in chosen) == (keep is not None):
                    yield record.row

    write(place, rows)
    return place


def _sources(
    result: Scores, corpus: str | Path | Corpus | None
) -> tuple[list[Source], Callable[[], BadRecords], Reading]:
    """The files of the records, a policy for bad ones, and how they are read; they must be those that were scored."""
    told, tokenizer = result.manifest["corpus"], result.manifest.get("tokenizer")
    if "seq_len" not in told or not tokenizer:
        raise InputError(
            f"the results in {result.path} are not of a corpus of text: their rows are your own, in your order"
        )
    place = corpus.info["path"] if isinstance(corpus, Corpus) else corpus if corpus is not None else told["path"]

    reading = Reading.of(told)

    def skipping() -> BadRecords:
        return BadRecords(reading.on_bad_record)

    shard = told["shard"] and Shard(*told["shard"])
    if isinstance(corpus, Corpus):
        sources = corpus.sources()
    elif place is None:
        raise InputError(
            "the records of the trace were in memory, so they cannot be read again; give the corpus from Python"
        )
    else:
        places = place if isinstance(place, list) else [place]
        sources = open_corpus([Path(x) for x in places], skipping(), reading, shard)
    if corpus_digest([x.fingerprint for x in sources], tokenizer["fingerprint"], reading) != told["fingerprint"]:
        raise MismatchError(
            f"the records at {place} are not those that were scored, or were changed since; give the same files with --corpus"
        )
    return sources, skipping, reading


def _chosen(
    documents: pd.DataFrame, columns: list[str], keep: str | None, drop: str | None, by: str | None, lowest: bool
) -> set[str]:
    """The documents with the largest or the smallest scores."""
    if keep is not None and drop is not None:
        raise ConfigError(f"--keep and --drop exclude each other: got {keep!r} and {drop!r}; give one of them")
    if by is None and len(columns) > 1:
        raise ConfigError(
            f"which question shall choose: got {len(columns)} columns; give --by one of {', '.join(columns[:8])}"
        )
    if by is not None and by not in columns:
        raise ConfigError(f"bad value for --by: got {by!r}; give one of {', '.join(columns[:8])}")
    count = _count(str(keep if keep is not None else drop), len(documents), "--keep" if keep is not None else "--drop")
    ordered = documents.sort_values(by or columns[0], ascending=lowest, kind="stable")
    return set(ordered["document"].head(count))


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
