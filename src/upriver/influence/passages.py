"""From rescored pairs to what is shown: passages with text, tokens and lexical comparison; answers with log-probabilities."""

import json
from typing import Any, NamedTuple

import numpy as np
import torch

from upriver.influence.gradients import Measured, measurements
from upriver.influence.results import Sides, TopRow, is_spurious, sides, token_scores
from upriver.influence.scanned import Scanned, scores_of
from upriver.influence.stages import Job
from upriver.influence.tokens import Rescored
from upriver.model.capture import frozen
from upriver.model.load import Model
from upriver.model.losses import LanguageModel
from upriver.text.candidates import tfidf_ranks
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries
from upriver.text.records import whole


class Shown(NamedTuple):
    """One place in the list of a query: which rescored pair stands there, and its sequence."""

    query: int
    side: str
    rank: int
    pair: int
    row: int
    scan_score: float


def top_rows(job: Job, scanned: Scanned, extremes: list[np.ndarray], found: Rescored) -> list[TopRow]:
    """The rows of ``top.parquet``: for each query its most positive and its most negative sequences."""
    shown = [x for q, rows in enumerate(extremes) for x in _shown(job, scanned, rows, found, q)]
    lexical = Lexical(job, shown)
    return [_row(job, lexical, found, x) for x in shown]


def _shown(job: Job, scanned: Scanned, rows: np.ndarray, found: Rescored, q: int) -> list[Shown]:
    out: list[Shown] = []
    ranked: Sides = sides(found, q, np.isin(found.rows_P, rows), job.opts.top)
    for side, pairs in zip(Sides._fields, ranked, strict=True):
        scan_P = scores_of(scanned, found.rows_P[pairs])[:, q]
        for rank, (pair, scan) in enumerate(zip(pairs, scan_P, strict=True), 1):
            out.append(Shown(q, side, rank, int(pair), int(found.rows_P[pair]), float(scan)))
    return out


def _row(job: Job, lexical: "Lexical", found: Rescored, x: Shown) -> TopRow:
    data, row, pair = job.data, x.row, x.pair
    score = float(found.layers_PL[pair].double().sum())
    text = isinstance(data, Corpus)
    start, end = (int(i) for i in data.span_N2[row]) if isinstance(data, Corpus) else (0, 0)
    document = int(data.document_of_N[row]) if isinstance(data, Corpus) else row
    return TopRow(
        query=job.queries.ids[x.query], side=x.side, rank=x.rank, sequence=row, start=start, end=end,
        document=data.document_id(document) if isinstance(data, Corpus) else str(row),
        score=score, score_nats=None if job.opts.curvature == "identity" else score / len(data), scan_score=x.scan_score,
        rescored=True, spurious=text and is_spurious(found, pair), layers=found.layers_PL[pair].numpy(),
        tokens=data.pieces(row) if isinstance(data, Corpus) else [],
        token_scores=token_scores(found, pair, int(data.lengths_N[row])) if text else np.empty(0, np.float32),
        text=data.text(row) if isinstance(data, Corpus) else "",
        metadata=whole(json.dumps(data.metadata(document), ensure_ascii=False)) if isinstance(data, Corpus) else "{}",
        **lexical.compare(x.query, row),
    )  # fmt: skip


class Lexical:
    """What words alone would have found: the TF-IDF rank of a shown passage, and the query tokens that it holds."""

    def __init__(self, job: Job, shown: list[Shown]):
        self.data, self.queries = job.data, job.queries
        self.tfidf: dict[tuple[int, int], tuple[int, float]] = {}
        if isinstance(job.data, Corpus) and isinstance(job.queries, Queries):
            rows_Q = [np.array([x.row for x in shown if x.query == q], np.int64) for q in range(len(job.queries))]
            for q, (rows, ranked) in enumerate(zip(rows_Q, tfidf_ranks(job.data, job.queries, rows_Q), strict=True)):
                pairs = zip(ranked.rank_R.tolist(), ranked.score_R.tolist(), strict=True)
                self.tfidf |= {(q, row): pair for row, pair in zip(rows.tolist(), pairs, strict=True)}
            self.tokens = [set(job.queries.token_ids(q).tolist()) for q in range(len(job.queries))]

    def compare(self, q: int, row: int) -> dict[str, Any]:
        if not isinstance(self.data, Corpus) or not isinstance(self.queries, Queries):
            return {"tfidf_rank": None, "tfidf_score": None, "overlap": None}
        rank, score = self.tfidf[q, row]
        shared = self.tokens[q] & set(self.data.token_ids(row).tolist())
        return {"tfidf_rank": rank, "tfidf_score": score, "overlap": len(shared) / len(self.tokens[q])}


def answers(model: Model, queries: Measured, rank_error: list[float | None]) -> list[dict[str, Any]]:
    """``queries.json``: each query with the log-probability of every token of its answer."""
    f_Q = measurements(model, queries)
    out = []
    for q, name in enumerate(queries.ids):
        entry: dict[str, Any] = {"id": name, "measurement": float(f_Q[q]), "rank_correlation": rank_error[q]}
        if isinstance(queries, Queries):
            entry |= _answer(model, queries, q)
        out.append(entry)
    return out


def _answer(model: Model, queries: Queries, q: int) -> dict[str, Any]:
    record = queries.records[q]
    asked: dict[str, Any] = {
        "prompt": record.prompt, "completion": record.completion, "contrast": record.contrast, "generated": record.generated,
    }  # fmt: skip
    if not isinstance(model.task, LanguageModel):  # whose measurement is another than the answer's probability
        return asked | {"log_prob": None, "completion_tokens": None, "contrast_tokens": None}
    batch = queries.batch([q]).to(model.device)
    with frozen(model.module), torch.no_grad():
        log_probs_NT = model.task.log_probs(model.module, batch)
    parts = [log_probs_NT[n][batch.inputs["loss"][n]].tolist() for n in range(len(log_probs_NT))]
    tokens = [
        [{"text": t, "log_prob": x} for t, x in zip(queries.completion_pieces(q, bool(n)), part, strict=True)]
        for n, part in enumerate(parts)
    ]
    log_prob = sum(parts[0]) - sum(sum(p) for p in parts[1:])
    contrast = tokens[1] if len(tokens) > 1 else None
    return asked | {"log_prob": log_prob, "completion_tokens": tokens[0], "contrast_tokens": contrast}


def rank_correlation(scanned: Scanned, found: Rescored, sample: np.ndarray) -> list[float | None]:
    """Per query, the correlation of scan scores with full-rank scores over the random sample."""
    full_P, sample = found.layers_PL.sum(1).double().numpy(), np.sort(sample)
    scan_SQ = scores_of(scanned, sample)
    out: list[float | None] = []
    for q in range(scan_SQ.shape[1]):
        pairs = np.flatnonzero((found.queries_P == q) & np.isin(found.rows_P, sample))
        scan = scan_SQ[np.searchsorted(sample, found.rows_P[pairs]), q]
        ok = len(pairs) > 2 and scan.std() > 0 and full_P[pairs].std() > 0
        out.append(float(np.corrcoef(scan, full_P[pairs])[0, 1]) if ok else None)
    return out
