"""From rescored pairs to what is shown: passages with text, tokens and lexical comparison; answers with log-probabilities."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch

from upriver.influence.job import Job
from upriver.influence.queries import Measured, batches, measurements
from upriver.influence.rescore import Pairs, Rescored, spurious
from upriver.influence.results import Sides, TopRow, calibration, sides
from upriver.influence.scan import Scanned
from upriver.model.capture import frozen
from upriver.model.losses import LanguageModel
from upriver.model.model import Model
from upriver.runtime.config import CONVENTIONS, MEASURED, POSITIVE
from upriver.text.batch import Sequences
from upriver.text.candidates import tfidf_ranks
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries
from upriver.text.records import whole
from upriver.text.tokenise import tokenizer_fingerprint

KEPT = 2048  # passages that stay in memory, as many questions show the same


class Shown(NamedTuple):
    """One place in the list of a query: which rescored pair stands there, and its sequence."""

    query: int
    side: str
    rank: int
    pair: int
    row: int
    scan_score: float


class Ranked(NamedTuple):
    """What rescoring found of all queries, without the tokens of each passage."""

    shown: list[list[Shown]]  # for each query
    agreement: list[float | None]  # for each query: of the scan's scores with those at full rank, on random sequences
    token_sum: (
        float  # the largest difference of a sum over tokens from that over layers, as a share of the largest score
    )


def ranked(job: Job, scanned: Scanned, extremes: list[np.ndarray], sample: np.ndarray, parts: list[Pairs]) -> Ranked:
    """Rank each query's ``extremes``, and compare its scan with full rank on ``sample``; one part is read at a time."""
    shown, agreement, difference, largest = [], [], 0.0, 1e-30
    for part in parts:
        found = part.read()
        by_layer_P, by_token_P = found.layers_PL.double().sum(1), found.tokens_PT.double().sum(1)
        difference = max(difference, float((by_layer_P - by_token_P).abs().max()))
        largest = max(largest, float(by_layer_P.abs().max()))
        rows, at_P = np.unique(found.rows_P, return_inverse=True)
        scan_P = scanned.of(rows)[at_P, found.queries_P]
        shown += [_shown(job, extremes[q], found, scan_P, q) for q in part.queries]
        agreement += [_rank_correlation(found, scan_P, sample, q) for q in part.queries]
    return Ranked(shown, agreement, difference / largest)


def top_rows(
    job: Job, shown: list[list[Shown]], parts: list[Pairs], solutions: list[dict[str, Any]]
) -> Iterator[list[TopRow]]:
    """The rows of ``top.parquet``, a query at a time: its most positive and its most negative sequences."""
    lexical, passage = Lexical(job, shown), lru_cache(KEPT)(partial(Passage.of, job.data))
    for part in parts:
        found = part.read()
        scores = found.layers_PL.double().sum(1).tolist()
        arrays = Arrays(scores, found.layers_PL.numpy(), found.tokens_PT.numpy())
        for q in part.queries:
            yield [_row(job, lexical, passage(x.row), arrays, x, calibration(solutions[q])) for x in shown[q]]


def _shown(job: Job, rows: np.ndarray, found: Rescored, scan_P: np.ndarray, q: int) -> list[Shown]:
    best: Sides = sides(found, q, np.isin(found.rows_P, rows), job.opts.top)
    return [
        Shown(q, side, rank, int(pair), int(found.rows_P[pair]), float(scan_P[pair]))
        for side, pairs in zip(Sides._fields, best, strict=True)
        for rank, pair in enumerate(pairs, 1)
    ]


class Passage(NamedTuple):
    """A sequence to a reader; an example of a task without text is a document of its own."""

    document: str
    part: int
    start: int
    end: int
    text: str
    tokens: list[str]
    metadata: str

    @classmethod
    def of(cls, data: Sequences, row: int) -> "Passage":
        if not isinstance(data, Corpus):
            return cls(str(row), 0, 0, 0, "", [], "{}")
        document, (start, end) = int(data.document_of_N[row]), (int(i) for i in data.span_N2[row])
        metadata = whole(json.dumps(data.metadata(document), ensure_ascii=False))
        return cls(*data.named(document), start, end, data.text(row), data.pieces(row), metadata)


class Arrays(NamedTuple):
    """Rescored pairs, as rows are made of them one by one."""

    scores: list[float]
    layers_PL: np.ndarray
    tokens_PT: np.ndarray


def _row(job: Job, lexical: "Lexical", passage: Passage, found: Arrays, x: Shown, scale: float | None) -> TopRow:
    tokens_T, score = found.tokens_PT[x.pair, : len(passage.tokens)], found.scores[x.pair]
    nats = None if job.n_train is None else score / job.n_train
    calibrated = None if nats is None or scale is None else nats * scale
    return TopRow(
        query=job.queries.ids[x.query], side=x.side, rank=x.rank, sequence=x.row,
        score=score, score_nats=nats, calibrated_nats=calibrated, scan_score=x.scan_score,
        rescored=True, spurious=spurious(tokens_T),
        layers=found.layers_PL[x.pair], token_scores=tokens_T, **passage._asdict(), **lexical.compare(x.query, x.row),
    )  # fmt: skip


class Lexical:
    """What words alone would have found: the TF-IDF rank of a shown passage, and the query tokens that it holds."""

    def __init__(self, job: Job, shown: list[list[Shown]]):
        self.data, self.queries = job.data, job.queries
        self.tfidf: dict[tuple[int, int], tuple[int, float]] = {}
        if isinstance(job.data, Corpus) and isinstance(job.queries, Queries):
            rows_Q = [np.array([x.row for x in some], np.int64) for some in shown]
            for q, (rows, ranked) in enumerate(zip(rows_Q, tfidf_ranks(job.data, job.queries, rows_Q), strict=True)):
                pairs = zip(ranked.rank_R.tolist(), ranked.score_R.tolist(), strict=True)
                self.tfidf |= {(q, row): pair for row, pair in zip(rows.tolist(), pairs, strict=True)}
            self.tokens = [set(job.queries.token_ids(q).tolist()) for q in range(len(job.queries))]
            self.of_row = lru_cache(KEPT)(lambda row, data=job.data: set(data.token_ids(row).tolist()))

    def compare(self, q: int, row: int) -> dict[str, Any]:
        if not isinstance(self.data, Corpus) or not isinstance(self.queries, Queries):
            return {"tfidf_rank": None, "tfidf_score": None, "overlap": None}
        rank, score = self.tfidf[q, row]
        shared = self.tokens[q] & self.of_row(row)
        return {"tfidf_rank": rank, "tfidf_score": score, "overlap": len(shared) / len(self.tokens[q])}


def answers(
    model: Model, queries: Measured, rank_error: list[float | None], solutions: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """``queries.json``: each query with the log-probability of every token of its answer."""
    f_Q = measurements(model, queries)
    out: list[dict[str, Any]] = []
    for q, name in enumerate(queries.ids):
        entry = {"id": name, "measurement": float(f_Q[q]), "rank_correlation": rank_error[q], "solution": solutions[q]}
        out.append(entry)
    if isinstance(queries, Queries):
        likely = _likely(model, queries) if isinstance(model.task, LanguageModel) else {}
        for q, (entry, members) in enumerate(zip(out, queries.members.values(), strict=True)):
            own: dict[int, list[int]] = {i: [] for i in members}
            for r in queries.rows_of_query[q]:
                own[queries.rows[r].record].append(r)
            told = [_answer(queries, i, rows, likely) for i, rows in own.items()]
            entry |= told[0] if queries.records[members[0]].group is None else _set(told)
            entry["asked"] = [queries.records[i].again() for i in members]
    return out


def _likely(model: Model, queries: Queries) -> dict[int, list[float]]:
    """The log-probability of each scored token of each row; of directions nothing, as they measure something else."""
    assert isinstance(model.task, LanguageModel)
    found: dict[int, list[float]] = {}
    with frozen(model.module), torch.no_grad():
        for batch in batches(queries, range(len(queries))):
            if "direction" not in batch.inputs:
                batch = batch.to(model.device)
                log_probs_NT, loss_NT = model.task.log_probs(model.module, batch).cpu(), batch.inputs["loss"].cpu()
                pairs = zip(log_probs_NT, loss_NT, strict=True)
                found |= {int(r): x_T[at_T].tolist() for r, (x_T, at_T) in zip(batch.rows_N, pairs, strict=True)}
    return found


def _answer(queries: Queries, i: int, rows: list[int], likely: dict[int, list[float]]) -> dict[str, Any]:
    """What is told of one record; several contrasts are lists."""
    record = queries.records[i]
    asked: dict[str, Any] = {
        "id": record.id, "prompt": record.prompt, "completion": record.completion, "contrast": _single(record.contrasts),
        "generated": record.generated, "labels": record.labels,
    }  # fmt: skip
    if record.direction:
        asked |= {"direction": record.direction.name, "layer": record.direction.layer}
    if not all(r in likely for r in rows):  # whose measurement is another than the answer's probability
        return asked | {"log_prob": None, "completion_tokens": None, "contrast_tokens": None}
    tokens = [[{"text": t, "log_prob": x} for t, x in zip(queries.pieces(r), likely[r], strict=True)] for r in rows]
    sums = [sum(likely[r]) for r in rows]
    log_prob = sums[0] - (sum(sums[1:]) / len(sums[1:]) if sums[1:] else 0)
    return asked | {"log_prob": log_prob, "completion_tokens": tokens[0], "contrast_tokens": _single(tokens[1:])}


def _single(values: Sequence[Any]) -> Any:
    return list(values) if len(values) > 1 else values[0] if values else None


def _set(told: list[dict[str, Any]]) -> dict[str, Any]:
    """What is told of a set: its members, and the mean of what is measured of them."""
    known = [x["log_prob"] for x in told if x["log_prob"] is not None]
    nothing = dict.fromkeys(("prompt", "completion", "contrast", "completion_tokens", "contrast_tokens"))
    mean = sum(known) / len(known) if len(known) == len(told) else None
    return nothing | {"generated": False, "labels": {}, "log_prob": mean, "members": told}


def _rank_correlation(found: Rescored, scan_P: np.ndarray, sample: np.ndarray, q: int) -> float | None:
    """The correlation of a query's scan scores with its full-rank scores over the random ``sample``."""
    pairs = np.flatnonzero((found.queries_P == q) & np.isin(found.rows_P, sample))
    full, scan = found.layers_PL[pairs].sum(1).double().numpy(), scan_P[pairs]
    return float(np.corrcoef(scan, full)[0, 1]) if len(pairs) > 2 and scan.std() > 0 and full.std() > 0 else None


LAMBDA = "a share of the mean eigenvalue of each layer, or absolute"


def manifest(
    job: Job,
    found: Ranked,
    kept: dict[str, Any] | None,
    coverage: dict[str, Any],
    solutions: list[dict[str, Any]],
    scan_dtype: str,
    times: dict[str, float],
) -> dict[str, Any]:
    """What a trace was made from, how, and how far it can be trusted: ``manifest.json``; see ``docs/formats.md``."""
    opts, model, known = job.opts, job.model, [x for x in found.agreement if x is not None]
    fitted, factors = (job.factors.options, job.factors.manifest) if job.factors else (None, None)
    why = next((x["why"] for x in solutions if x.get("why")), None)
    return {
        "upriver": version("upriver"),
        "stage": "trace",
        "model": {
            "name": model.name,
            "fingerprint": job.stage.key["model"],
            "parameters": coverage["total"],
            "dtype": fitted.dtype if fitted else str(model.dtype).removeprefix("torch."),
            "scan_dtype": scan_dtype,
            "exact_dtype": job.division.exact,
            **model.info | {"attention": model.attention, "positions": model.positions},
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(model.tokenizer)} if model.tokenizer else None,
        "corpus": getattr(job.data, "info", {"sequences": len(job.data), "fingerprint": job.data.fingerprint}),
        "n_train": job.n_train or len(job.data),
        "n_train_from": "given" if opts.n_train else "factors" if job.factors else "corpus",
        "scored_sequences": len(job.rows),
        "candidates": kept,
        "coverage": coverage,
        "layers": [x.told() for x in job.layers],
        "curvature": opts.curvature,
        "solver": {
            "name": opts.curvature,
            "refine": opts.refine,
            "combine": opts.combine,
            "converged": all(x["converged"] for x in solutions),
            "why": why,
            "passes": max((x.get("products") or 0.0 for x in solutions), default=0.0),
            "lambda_rule": LAMBDA,
        },
        "damping": opts.damping if job.n_train else "none",
        "fisher": {"labels": fitted.fisher, "draws": fitted.draws, "seed": fitted.seed} if fitted else None,
        "fit": factors["fit"] if factors else None,
        "factors": os.path.relpath(job.factors.path, job.stage.path) if job.factors else None,
        "rank": opts.rank,
        "rank_error": {
            "mean": sum(known) / len(known) if known else None,
            "worst": min(known) if known else None,
            "what": "correlation of the scan's scores with full-rank scores on random sequences, over queries",
        },
        "top": opts.top,
        "kernel": model.attention,
        "checks": {"token_sum": found.token_sum},
        "conventions": CONVENTIONS,
        "sign": POSITIVE if isinstance(model.task, LanguageModel) else MEASURED,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": sys.version.split()[0]},
        "timings": times | {"scan_tokens": int(job.data.lengths_N[job.rows].sum())},
    }
