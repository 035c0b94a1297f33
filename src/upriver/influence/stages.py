"""The resumable stages of a trace: solved queries, the scan of the corpus, and the full-rank second look at the top."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from upriver.curvature.base import Damping
from upriver.curvature.factors import Factors
from upriver.influence.gradients import Measured, Solver, query_chunks, read_solved
from upriver.influence.scanned import Pass, Scanned, gather
from upriver.influence.score import Route, Score, choose_orders, route
from upriver.influence.tokens import Rescored, rescore
from upriver.model.layers import Layer
from upriver.model.load import Model
from upriver.model.sweep import UNIT_TOKENS, Labels, split_units, sweep
from upriver.runtime import dist
from upriver.runtime.config import TraceOptions
from upriver.runtime.progress import Progress
from upriver.runtime.store import Stage, Tensors
from upriver.text.batch import Sequences


class Job(NamedTuple):
    """What one trace works on, decided before it starts."""

    stage: Stage
    model: Model
    layers: list[Layer]
    data: Sequences
    queries: Measured
    factors: Factors
    rows: np.ndarray  # the sequences that are scored
    opts: TraceOptions
    progress: Progress

    @property
    def damping(self) -> Damping:
        return Damping(0.0, False) if self.opts.curvature == "identity" else Damping.parse(self.opts.damping)

    @property
    def rank(self) -> int | None:
        return None if self.opts.rank == "full" else self.opts.rank

    @property
    def solver(self) -> Solver:
        return Solver(self.model, self.layers, self.factors, self.queries, self.opts.curvature, self.damping)

    def open(self, name: str) -> Stage:
        return Stage.open(self.stage.path / name, name, self.stage.key)


def solve_stage(job: Job) -> list:
    """Solve and compress every query, a chunk at a time; returns the files of the chunks."""
    stage, chunks = job.open("solved"), query_chunks(job.layers, job.queries, job.rank)
    with job.progress("queries", len(job.queries)) as advance:
        for unit in dist.share(len(chunks)):
            if not stage.has(unit):
                stage.commit(unit, _solved(job, chunks[unit]))
            advance(len(chunks[unit]))
    dist.barrier()
    return [stage.unit_path(unit) for unit in range(len(chunks))]


def _solved(job: Job, chunk: list[int]) -> Tensors:
    if job.rank is None:
        return {f"v:{name}": v for name, v in job.solver.full(chunk).items()}
    return job.solver.low_rank(chunk, job.rank)


def plan_routes(job: Job, solved: list, batches: list[np.ndarray]) -> dict[str, Route]:
    """Each layer's order of contraction, chosen for a batch of mean size, and its queries laid out for it."""
    M = float(np.mean([job.data.lengths_N[rows].sum() for rows in batches]))
    N = float(np.mean([len(rows) for rows in batches]))
    orders = choose_orders(job.layers, int(M), max(1, round(N)), len(job.queries), job.rank)
    return {x.name: route(orders[x.name], read_solved(solved, x.name), job.model.like) for x in job.layers}


def scan_stage(job: Job, solved: list, note: Callable[[str], None]) -> Scanned:
    """Score every wanted sequence against all queries in one pass, committed unit by unit."""
    stage = job.open("scan")
    batches = job.data.plan(job.opts.batch_tokens, job.rows)
    units = split_units(batches, job.data.lengths_N)
    routes = plan_routes(job, solved, batches)
    counts = {order: sum(r.order == order for r in routes.values()) for order in ("tokens", "dense", "rebuilt")}
    note("contraction: " + ", ".join(f"{n} layers by {order}" for order, n in counts.items() if n))
    with job.progress("scan", int(job.data.lengths_N[job.rows].sum())) as advance:
        for unit in dist.share(len(units)):
            if stage.has(unit):
                advance(sum(int(job.data.lengths_N[rows].sum()) for rows in units[unit]))
                continue
            consumer = Score(routes, len(job.queries), job.opts.layer_scores)
            sweep(job.model, job.layers, job.data, units[unit], consumer, Labels(), advance)
            stage.commit(unit, consumer.tensors())
    dist.barrier()
    L = len(job.layers) if job.opts.layer_scores else None
    return gather([Pass(stage, len(units), slice(0, len(job.queries)))], np.sort(job.rows), L)


def rescore_stage(job: Job, wanted: list[np.ndarray]) -> Rescored:
    """Full-rank scores of the wanted pairs, computed in the model's dtype, kept in float32; a chunk of queries at a time."""
    stage = job.open("rescored")
    chunks = _rescore_chunks(job, wanted)
    with job.progress("rescore", sum(len(rows) for rows in wanted)) as advance:
        for unit in dist.share(len(chunks)):
            if not stage.has(unit):
                found = _rescored(job, chunks[unit], wanted)
                stage.commit(unit, {k: torch.as_tensor(v) for k, v in found._asdict().items()})
            advance(sum(len(wanted[q]) for q in chunks[unit]))
    dist.barrier()
    return _merge([stage.read(unit) for unit in range(len(chunks))])


def _rescore_chunks(job: Job, wanted: list[np.ndarray]) -> list[list[int]]:
    """Chunks of queries that fit in memory at full rank and whose sequences make about one unit of work."""
    chunks: list[list[int]] = []
    for whole in query_chunks(job.layers, job.queries, None):
        tokens = UNIT_TOKENS + 1
        for q in whole:
            cost = int(job.data.lengths_N[wanted[q]].sum())
            if tokens + cost > UNIT_TOKENS:
                chunks.append([])
                tokens = 0
            chunks[-1].append(q)
            tokens += cost
    return chunks


def _rescored(job: Job, chunk: list[int], wanted: list[np.ndarray]) -> Rescored:
    solved = job.solver.full(chunk)
    pairs: dict[int, list[int]] = {}
    for slot, q in enumerate(chunk):
        for row in wanted[q]:
            pairs.setdefault(int(row), []).append(slot)
    found = rescore(job.model, job.layers, job.data, solved, pairs, job.opts.batch_tokens)
    return found._replace(queries_P=np.array(chunk)[found.queries_P])


def _merge(parts: list[dict[str, Any]]) -> Rescored:
    width = max(p["tokens_PT"].shape[1] for p in parts)
    tokens = [torch.nn.functional.pad(p["tokens_PT"], (0, width - p["tokens_PT"].shape[1])) for p in parts]
    rows, queries = (torch.cat([p[name] for p in parts]).numpy() for name in ("rows_P", "queries_P"))
    return Rescored(rows, queries, torch.cat(tokens), torch.cat([p["layers_PL"] for p in parts]))
