"""Write the results of a trace, as pandas, Polars and DuckDB read them: ``scores``, ``documents`` and ``top`` tables."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.influence.stages import Scanned
from upriver.influence.tokens import Rescored, spurious
from upriver.runtime.store import atomic, write_array
from upriver.text.batch import Sequences
from upriver.text.corpus import Corpus

ROW_GROUP = 100_000


def write_frame(path: Path, frame: pd.DataFrame, schema: pa.Schema | None = None) -> None:
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    with atomic(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP)


def write_scores(folder: Path, data: Sequences, ids: list[str], scanned: Scanned) -> None:
    """``scores.parquet``, ``documents.parquet`` and, with per-layer scores, ``layers.npy``."""
    places = _places(data, scanned.rows_N)
    scores = pd.DataFrame(scanned.scores_NQ, columns=pd.Index(ids))
    write_frame(folder / "scores.parquet", pd.concat([places, scores], axis=1))
    number_N, names = pd.factorize(places["document"])
    sums_DQ = np.zeros((len(names), len(ids)))
    np.add.at(sums_DQ, number_N, scanned.scores_NQ)
    documents = pd.DataFrame({"document": names, "sequences": np.bincount(number_N).astype(np.int64)})
    sums = pd.DataFrame(sums_DQ.astype(np.float32), columns=pd.Index(ids))
    write_frame(folder / "documents.parquet", pd.concat([documents, sums], axis=1))
    if scanned.layers_NQL is not None:
        write_array(folder / "layers.npy", scanned.layers_NQL)


def _places(data: Sequences, rows_N: np.ndarray) -> pd.DataFrame:
    if isinstance(data, Corpus):
        names = [data.document_id(int(i)) for i in data.document_of_N[rows_N]]
        start, end = np.asarray(data.span_N2[rows_N], np.int64).T
    else:
        names, start, end = [str(r) for r in rows_N], np.zeros(len(rows_N), np.int64), np.zeros(len(rows_N), np.int64)
    return pd.DataFrame({"sequence": rows_N.astype(np.int64), "document": names, "start": start, "end": end})


class TopRow(NamedTuple):
    """One row of ``top.parquet``; see ``docs/formats.md``."""

    query: str
    side: str
    rank: int
    sequence: int
    document: str
    start: int
    end: int
    score: float
    score_nats: float
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


F32, STR = pa.float32(), pa.string()
TOP_SCHEMA = pa.schema(
    [
        ("query", STR), ("side", STR), ("rank", pa.int64()), ("sequence", pa.int64()), ("document", STR),
        ("start", pa.int64()), ("end", pa.int64()), ("score", F32), ("score_nats", F32), ("scan_score", F32),
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


def write_top(folder: Path, rows: list[TopRow]) -> None:
    frame = pd.DataFrame(rows, columns=pd.Index(TopRow._fields))
    frame["tfidf_rank"] = frame["tfidf_rank"].astype("Int64")
    write_frame(folder / "top.parquet", frame, TOP_SCHEMA)


def token_scores(found: Rescored, pair: int, length: int) -> np.ndarray:
    return found.tokens_PT[pair, :length].numpy()


def is_spurious(found: Rescored, pair: int) -> bool:
    return spurious(found.tokens_PT[pair].numpy())
