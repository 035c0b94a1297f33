"""Write the results of a trace, as pandas, Polars and DuckDB read them: ``scores``, ``documents`` and ``top`` tables.

Axes: N scanned sequences, C of them in a chunk, Q queries, D documents of a chunk.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.influence.rescore import Rescored
from upriver.influence.scan import Scanned
from upriver.runtime.artifact import atomic
from upriver.runtime.config import SELF
from upriver.text.batch import Sequences
from upriver.text.corpus import Corpus

ROW_GROUP, GROUP_BYTES = 100_000, 8 << 20  # rows at most, and bytes of scores


@contextmanager
def parquet(path: Path, size: int, schema: pa.Schema | None = None) -> Iterator[Callable[[pd.DataFrame], None]]:
    """A table that is written frame by frame, in groups of about ``size`` rows, and appears when it is complete."""
    held: list[pd.DataFrame] = []
    with atomic(path) as temporary, ExitStack() as files:
        writers: list[pq.ParquetWriter] = []

        def write() -> None:
            frame = held[0] if len(held) == 1 else pd.concat(held, ignore_index=True)
            held.clear()
            table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
            if not writers:
                sink = files.enter_context(open(temporary, "wb"))  # arrow takes some names for addresses
                writers.append(files.enter_context(pq.ParquetWriter(sink, table.schema)))
            writers[0].write_table(table)

        def add(frame: pd.DataFrame) -> None:
            held.append(frame)
            if sum(map(len, held)) >= size:
                write()

        yield add
        if held:
            write()


def write_scores(folder: Path, data: Sequences, columns: list[str], scanned: Scanned) -> None:
    """``scores.parquet``, ``documents.parquet`` and, with per-layer scores, ``layers.npy``; a unit in memory at a time."""
    documents, size = Documents(columns), max(1, min(ROW_GROUP, GROUP_BYTES // (4 * len(columns))))
    with (
        parquet(folder / "scores.parquet", size) as add_scores,
        parquet(folder / "documents.parquet", size) as add_documents,
    ):
        for unit, (rows_C, scores_CQ) in enumerate(scanned.chunks()):
            places = _places(data, rows_C)
            parts = [places, pd.DataFrame(scores_CQ, columns=pd.Index(columns))]
            if scanned.energy_Q is not None:
                named = pd.Index([f"{name}@unit" for name in columns])
                parts.append(pd.DataFrame(scanned.unit_norm(unit), columns=named))
                parts.append(pd.DataFrame({SELF: scanned.own(unit)[:, 0].astype(np.float32)}))
            add_scores(pd.concat(parts, axis=1))
            add_documents(documents.add(places["document"].tolist(), scores_CQ))
        add_documents(documents.finish())
    if scanned.n_layers is not None:
        shape = (sum(map(len, scanned.units)), scanned.n_columns, scanned.n_layers)
        with atomic(folder / "layers.npy") as temporary, open(temporary, "wb") as sink:
            form = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(sink, form)
            for unit in range(len(scanned.units)):
                sink.write(scanned.by_layer(unit).tobytes())


class Documents:
    """Sums over the sequences of each document, which follow each other: only the last one may go on in the next chunk."""

    def __init__(self, ids: list[str]):
        self.columns = pd.Index(ids)
        self.name, self.count, self.sum_Q = "", 0, np.zeros(len(ids))

    def add(self, names: list[str], scores_CQ: np.ndarray) -> pd.DataFrame:
        """Take in a chunk of sequences; returns the documents that are complete."""
        before = [self.name if self.count else None, *names]
        new_C = np.array([name != last for name, last in zip(names, before, strict=False)])
        number_C = np.cumsum(new_C)  # 0: the document that goes on
        sums_DQ = np.zeros((number_C[-1] + 1, len(self.sum_Q)))
        sums_DQ[0] = self.sum_Q
        np.add.at(sums_DQ, number_C, scores_CQ)
        counts_D = np.bincount(number_C, minlength=len(sums_DQ)).astype(np.int64)
        counts_D[0] += self.count
        names_D = [self.name, *(name for name, new in zip(names, new_C, strict=True) if new)]
        self.name, self.count, self.sum_Q = names_D[-1], int(counts_D[-1]), sums_DQ[-1]
        done = slice(0 if counts_D[0] else 1, -1)  # before the first document there was none
        return self._frame(names_D[done], counts_D[done], sums_DQ[done])

    def finish(self) -> pd.DataFrame:
        return self._frame([self.name], np.array([self.count]), self.sum_Q[None])

    def _frame(self, names_D: list[str], counts_D: np.ndarray, sums_DQ: np.ndarray) -> pd.DataFrame:
        documents = pd.DataFrame({"document": pd.Series(names_D, dtype="str"), "sequences": counts_D})
        return pd.concat([documents, pd.DataFrame(sums_DQ.astype(np.float32), columns=self.columns)], axis=1)


def _places(data: Sequences, rows_C: np.ndarray) -> pd.DataFrame:
    if isinstance(data, Corpus):
        documents, number_C = np.unique(data.document_of_N[rows_C], return_inverse=True)
        named = [data.named(int(document)) for document in documents]
        names, part = zip(*(named[number] for number in number_C), strict=True)
        start, end = np.asarray(data.span_N2[rows_C], np.int64).T
    else:
        names, (part, start, end) = [str(r) for r in rows_C], np.zeros((3, len(rows_C)), np.int64)
    places = {"sequence": rows_C.astype(np.int64), "document": names, "part": np.array(part, np.int64)}
    return pd.DataFrame(places | {"start": start, "end": end})


class TopRow(NamedTuple):
    """One row of ``top.parquet``; see ``docs/formats.md``."""

    query: str
    side: str
    rank: int
    sequence: int
    document: str
    part: int
    start: int
    end: int
    score: float
    score_nats: float | None  # None: gradient dot products, which are in no unit
    calibrated_nats: float | None  # None: the scale of the query's solution was not measured
    scan_score: float
    rescored: bool
    spurious: bool
    layers: np.ndarray
    tokens: list[str]
    token_scores: np.ndarray
    text: str
    tfidf_rank: int | None
    tfidf_score: float | None
    overlap: float | None
    metadata: str


def calibration(solution: dict[str, Any] | None) -> float | None:
    """The factor that gives a query's nats their length, which held-out sequences measured; None where it is not known.

    A ``best_scale`` that is not positive says that the solution points the wrong way, and calibrates nothing.
    """
    scale = (solution or {}).get("best_scale")
    return scale if scale and scale > 0 else None


F32, STR = pa.float32(), pa.string()
TOP_SCHEMA = pa.schema(
    [
        ("query", STR), ("side", STR), ("rank", pa.int64()), ("sequence", pa.int64()), ("document", STR),
        ("part", pa.int64()), ("start", pa.int64()), ("end", pa.int64()), ("score", F32), ("score_nats", F32),
        ("calibrated_nats", F32), ("scan_score", F32),
        ("rescored", pa.bool_()), ("spurious", pa.bool_()), ("layers", pa.list_(F32)), ("tokens", pa.list_(STR)),
        ("token_scores", pa.list_(F32)), ("text", STR), ("tfidf_rank", pa.int64()), ("tfidf_score", F32),
        ("overlap", F32), ("metadata", STR),
    ]
)  # fmt: skip


class Sides(NamedTuple):
    """The pairs of one query that are shown, best first: indices into the rescored pairs."""

    positive: np.ndarray
    negative: np.ndarray


def sides(found: Rescored, query: int, keep: np.ndarray, top: int) -> Sides:
    """Rank the rescored pairs ``keep`` of a query by their full-rank scores; ties by sequence."""
    pairs = np.flatnonzero((found.queries_P == query) & keep)
    score = found.layers_PL.sum(1).double().numpy()[pairs]
    order = np.lexsort((found.rows_P[pairs], -score))
    ranked, values = pairs[order], score[order]
    return Sides(ranked[values > 0][:top], ranked[values < 0][::-1][:top])


def write_top(folder: Path, rows: Iterable[list[TopRow]]) -> None:
    """``top.parquet``, from the rows of one query after the other."""
    form = pd.DataFrame([], columns=pd.Index(TopRow._fields)).astype({"tfidf_rank": "Int64"})
    schema = pa.Table.from_pandas(
        form, schema=TOP_SCHEMA, preserve_index=False
    ).schema  # with what pandas wants to know
    with (
        atomic(folder / "top.parquet") as temporary,
        open(temporary, "wb") as sink,
        pq.ParquetWriter(sink, schema) as file,
    ):
        for columns in (list(zip(*some, strict=True)) or [[]] * len(schema) for some in rows):
            file.write_table(
                pa.table([pa.array(x, f.type) for x, f in zip(columns, schema, strict=True)], schema=schema)
            )
