"""Sums of scores over groups of documents, by a field of their records, with bootstrap intervals over documents.

SCORES/groups-FIELD.parquet    a row per question and group (docs/formats.md); what it is of stands in the metadata of its schema

Axes: D documents, G groups, C columns (questions, and differences of two), B draws.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.errors import ConfigError, InputError, QueryError
from upriver.runtime.artifact import atomic, unreadable
from upriver.runtime.config import PLAIN_GRADIENTS
from upriver.show.folder import Json, read_columns, read_results
from upriver.show.records import scored_records, shown_unit
from upriver.text.corpus import Corpus
from upriver.text.records import whole

LEVEL, DRAWS, SEED = 0.95, 1000, 0
BINS = 12  # of a field of numbers that has more values
MOST = 1000  # groups
HELD = 1 << 26  # bytes of weights, or of sums, that are held at once
AGAIN = "give `upriver report` again with --by"
MARK = b"upriver-groups"  # of the schema
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
F64, STR = pa.float64(), pa.string()
SCHEMA = pa.schema(
    [
        ("query", STR), ("minus", STR), ("group", STR), ("from", F64), ("to", F64), ("documents", pa.int64()),
        ("sequences", pa.int64()), ("sum", F64), ("low", F64), ("high", F64),
        ("mean", F64), ("mean_low", F64), ("mean_high", F64),
    ]
)  # fmt: skip


class Group(NamedTuple):
    """One group of documents; a bin of numbers holds ``low <= x < high``."""

    name: str | None  # None: the documents without a value
    low: float | None = None
    high: float | None = None


class Table(NamedTuple):
    """A table that was written, and of what: field, unit, width of a bin, level and seed of the bootstrap."""

    told: Json
    frame: pd.DataFrame


def by_group(
    scores: str | Path,
    field: str,
    *,
    contrasts: Sequence[tuple[str, str]] = (),
    corpus: str | Path | Corpus | None = None,
    width: float | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> pd.DataFrame:
    """Sum the scores of a trace over groups of documents, and write the table ``groups-FIELD.parquet`` into its folder.

    Sums are in nats of one more copy of each document, calibrated where the trace measured that (dot products of gradients are
    in no unit).  The intervals hold 95 % of the bootstrap: documents of the whole corpus are drawn with replacement, so that a
    group has more or fewer of them; the same draws serve all questions, so that a difference of two is paired by document.
    A field of numbers with more than 12 values is cut into bins of equal width.

    Args:
        field: of the records; ``a.b`` is the field ``b`` of the field ``a``.
        contrasts: pairs of questions, whose difference is summed as well (``query`` and ``minus`` of the table).
        corpus: where the records are now; None: where the trace read them.
        width: of a bin of numbers.
        draws, seed: of the bootstrap, which depends on nothing else.

    Returns:
        A row per question and group: ``query``, ``minus``, ``group`` (null: the documents without a value), ``from``, ``to``,
        ``documents``, ``sequences``, ``sum``, ``low``, ``high``, and per document ``mean``, ``mean_low``, ``mean_high``.

    Raises:
        ConfigError: no record has such a field, or it makes no groups.
        QueryError: a contrast of a question that was not asked.
        MismatchError: the records are not those that were scored.
        InputError: the results are not of a corpus of text, or hold no sums of documents.

    Example:
        >>> up.by_group("scores", "year", contrasts=[("q1", "q2")])
    """
    path = Path(scores)
    manifest, queries = read_results(path)
    ids = [str(x["id"]) for x in queries]
    unknown = [name for pair in contrasts for name in pair if name not in ids]
    if unknown:
        raise QueryError(f"no such query in a contrast: got {unknown[0]!r}; the results have {', '.join(ids[:8])}")
    documents = read_columns(path / "documents.parquet", ["document", "sequences", *ids])
    if not {"document", *ids} <= set(documents.columns):
        raise InputError(f"no sums of documents in the results: got {path}; trace again")
    code_D, groups, bin_width = grouped(
        _values(path, manifest, field, documents["document"].tolist(), corpus), field, width
    )
    raw_DC = documents[ids].to_numpy(float) * shown_unit(manifest, queries, ids)
    at = {name: i for i, name in enumerate(ids)}
    pairs = [(at[a], at[b]) for a, b in contrasts]
    values_DC = np.concatenate([raw_DC, *(raw_DC[:, [i]] - raw_DC[:, [j]] for i, j in pairs)], axis=1)
    named = [(name, None) for name in ids] + list(contrasts)
    counts_G = np.bincount(code_D, minlength=len(groups))
    sequences_G = np.bincount(code_D, documents["sequences"].to_numpy(float), len(groups)).astype(int)
    sums = bootstrap(values_DC, code_D, len(groups), draws, seed)
    frame = pd.DataFrame(
        {
            "query": name, "minus": minus, "group": group.name, "from": group.low, "to": group.high, "documents": counts_G[g],
            "sequences": sequences_G[g], **{key: x[g, c] for key, x in sums.items()},
        }
        for c, (name, minus) in enumerate(named)
        for g, group in enumerate(groups)
    )  # fmt: skip
    told = {
        "field": field,
        "unit": "raw" if manifest.get("curvature") in PLAIN_GRADIENTS else "nats",
        "bin": bin_width,
        "candidates": bool(manifest.get("candidates")),
        "level": LEVEL,
        "draws": draws,
        "seed": seed,
        "scores": manifest["files"]["documents.parquet"],
    }
    write_groups(path / file_of(field), frame, told)
    return frame


def file_of(field: str) -> str:
    """The name of a field's table; what no file name takes is written as %XX."""
    return f"groups-{quote(whole(field), safe='')[:180]}.parquet"


def write_groups(place: Path, frame: pd.DataFrame, told: Json) -> None:
    """Write a table and what it is of.

    Raises:
        ConfigError: a file is there that is none.
    """
    schema = SCHEMA.with_metadata({MARK: json.dumps(told).encode()})
    if place.exists() and not is_groups(place):
        raise ConfigError(
            f"a table of groups would overwrite a file that this program did not write: got {place}; move it away"
        )
    with atomic(place) as temporary, open(temporary, "wb") as sink:
        pq.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False), sink, write_page_checksum=True)


def is_groups(file: Path) -> bool:
    """Whether a file is a table of groups."""
    try:
        with open(file, "rb") as raw:
            return MARK in (pq.read_schema(raw).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def read_groups(path: Path, manifest: Json) -> list[Table]:
    """The tables of groups in a folder of results, by field.

    Raises:
        InputError: one is damaged.
    """
    tables = []
    for file in sorted(path.glob("groups-*.parquet")):
        if not is_groups(file):
            continue
        try:
            with open(file, "rb") as raw:
                table = pq.read_table(raw, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise InputError(str(unreadable(file, error, AGAIN))) from error
        told = json.loads((table.schema.metadata or {})[MARK])
        if told["scores"] == manifest["files"].get(
            "documents.parquet"
        ):  # another trace's went with it, unless somebody copied it here
            tables.append(Table(told, table.to_pandas()))
    return tables


# ---- values of a field


def _values(
    path: Path, manifest: Json, field: str, documents: list[str], corpus: str | Path | Corpus | None
) -> list[Any]:
    """The field of each document's record; None where it has none."""
    found: dict[str, Any] = {}
    fields: dict[str, None] = {}
    wanted, nothing = set(documents), object()
    for record in scored_records(path, manifest, corpus)():
        if record.id in wanted:
            value: Any = record.metadata.get(field, nothing)
            if value is nothing:
                value = record.metadata
                for name in field.split("."):
                    value = value.get(name, nothing) if isinstance(value, dict) else nothing
            if value is not nothing:
                found[record.id] = value
            fields |= dict.fromkeys(record.metadata)
    if not found:
        known = f"give one of {', '.join(list(fields)[:12])}" if fields else "they have no further fields"
        raise ConfigError(f"no record has the field {field!r} to group by; {known}")
    return [found.get(name) for name in documents]


def grouped(
    values_D: list[Any], field: str, width: float | None = None
) -> tuple[np.ndarray, list[Group], float | None]:
    """The group of each document, the groups in their order (numbers ascending, none last), and the width of a bin.

    Raises:
        ConfigError: the values are lists or objects, too many texts, or no numbers where a width is given.
    """
    values_D = [None if x == "" or (isinstance(x, float) and not math.isfinite(x)) else x for x in values_D]
    if bad := next((x for x in values_D if isinstance(x, list | dict)), None):
        raise ConfigError(
            f"a group is a text, a number or true or false: got {bad!r:.80} in {field!r}; name a field of it"
        )
    numbers_D = [_number(x) for x in values_D]
    if all((x is None) == (n is None) for x, n in zip(values_D, numbers_D, strict=True)) and any(
        n is not None for n in numbers_D
    ):
        return _by_number(np.array([np.nan if n is None else n for n in numbers_D]), field, width)
    if width is not None:
        raise ConfigError(f"a width is of bins of numbers: got {width} for {field!r}, which holds texts; leave it out")
    names_D = [None if x is None else json.dumps(x) if isinstance(x, bool) else whole(str(x)) for x in values_D]
    names = sorted({x for x in names_D if x is not None})
    _few(len(names), field)
    groups = [*map(Group, names), *([Group(None)] if None in names_D else [])]
    place = {group.name: g for g, group in enumerate(groups)}
    return np.array([place[x] for x in names_D]), groups, None


def _few(count: int, field: str) -> None:
    if count > MOST:
        raise ConfigError(
            f"too many groups: the field {field!r} has {count:,} values; group by one that has at most {MOST:,}"
        )


def _number(x: Any) -> float | None:
    """A number, also as a file without types writes it; a text with a leading zero is a name."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    return float(x) if isinstance(x, str) and NUMBER.fullmatch(x) else None


def _by_number(x_D: np.ndarray, field: str, width: float | None) -> tuple[np.ndarray, list[Group], float | None]:
    known = np.unique(x_D[~np.isnan(x_D)])
    whole_numbers = bool((known == np.floor(known)).all())
    if width is None and len(known) > BINS:
        width = _step((known[-1] - known[0]) / BINS, whole_numbers)
    if width is None:
        edges_D, edges = x_D, known
        groups = [Group(f"{v:.15g}", float(v), float(v)) for v in known.tolist()]
    else:
        if not 0 < width < float("inf"):
            raise ConfigError(f"bad width of bins: got {width}; give a positive number")
        edges_D = np.floor(x_D / width + 1e-9)
        edges = np.unique(edges_D[~np.isnan(edges_D)])
        _few(len(edges), field)
        last = 1 if whole_numbers and width == int(width) else 0  # of whole numbers the last one of a bin is named
        groups = []
        for low, high in ((float(f"{k * width:.12g}"), float(f"{(k + 1) * width:.12g}")) for k in edges.tolist()):
            name = f"{low:.15g}" if last == width else f"{low:.12g} to {high - last:.12g}"
            groups.append(Group(name, low, high))
    code_D = np.searchsorted(edges, np.nan_to_num(edges_D, nan=edges[-1]))
    lacking_D = np.isnan(x_D)
    if lacking_D.any():
        code_D[lacking_D] = len(groups)
        groups.append(Group(None))
    return code_D, groups, width


def _step(least: float, whole_numbers: bool) -> float:
    """1, 2 or 5 times a power of ten, of at least so much."""
    power = 10.0 ** math.floor(math.log10(least))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= least * (1 - 1e-9))
    return max(1.0, step) if whole_numbers else step


# ---- bootstrap


def bootstrap(values_DC: np.ndarray, code_D: np.ndarray, groups: int, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Sums and means over the documents of each group, with their intervals: ``[G, C]`` each.

    A mean has no interval where its group is a single document, which says nothing of how others would be.
    """
    order = np.argsort(code_D, kind="stable")
    sorted_DC, D = values_DC[order], len(code_D)
    counts_G = np.bincount(code_D, minlength=groups)
    ends = np.cumsum(counts_G)
    spans = list(zip((ends - counts_G).tolist(), ends.tolist(), strict=True))
    sum_GC = np.stack([sorted_DC[a:b].sum(0) for a, b in spans])
    found = {"sum": sum_GC, "mean": sum_GC / counts_G[:, None]}
    found |= {name: np.full_like(sum_GC, np.nan) for name in ("low", "high", "mean_low", "mean_high")}
    at_once, tails = max(1, HELD // (8 * draws * groups)), ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    for first in range(0, values_DC.shape[1], at_once):
        columns = slice(first, first + at_once)
        part_DC = np.ascontiguousarray(sorted_DC[:, columns])
        sums_GBC, n_GB = np.empty((groups, draws, part_DC.shape[1])), np.empty((groups, draws))
        done = 0
        for weights_BD in _weights(D, draws, seed):
            rows = slice(done, done := done + len(weights_BD))
            for g, (a, b) in enumerate(spans):
                np.matmul(weights_BD[:, a:b], part_DC[a:b], out=sums_GBC[g, rows])
                n_GB[g, rows] = weights_BD[:, a:b].sum(1)
        for g, (sums_BC, n_B) in enumerate(zip(sums_GBC, n_GB, strict=True)):
            found["low"][g, columns], found["high"][g, columns] = np.quantile(sums_BC, tails, axis=0)
            if counts_G[g] > 1:
                drawn = n_B > 0
                ends_2C = np.quantile(sums_BC[drawn] / n_B[drawn, None], tails, axis=0)
                found["mean_low"][g, columns], found["mean_high"][g, columns] = ends_2C
    return found


def _weights(D: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each document was drawn, float64, some draws at a time."""
    rng, some = np.random.default_rng(seed), max(1, HELD // (8 * D))
    for first in range(0, draws, some):
        yield np.stack(
            [np.bincount(rng.integers(D, size=D), minlength=D).astype(float) for _ in range(min(some, draws - first))]
        )
