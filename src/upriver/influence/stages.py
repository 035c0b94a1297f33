"""The resumable stages of a trace: solved queries, the scan of the corpus, and the rescoring of the top at full rank."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from upriver.curvature.base import Damping
from upriver.curvature.factors import Factors
from upriver.influence.gradients import Measured, Solver, query_chunks, read_solved, weighted_measurement
from upriver.influence.scanned import Scan, Scanned, gather
from upriver.influence.score import Route, Score, route
from upriver.influence.tokens import Rescored, rescore
from upriver.model.layers import Layer
from upriver.model.load import Model
from upriver.model.memory import memory_budget, settle, settled_split
from upriver.model.shape import batch_shape, model_shape
from upriver.model.sweep import UNIT_TOKENS, Labels, split_units, sweep, tokens_of
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, Tensors, read_tensors
from upriver.runtime.config import TraceOptions
from upriver.runtime.counts import Shape, contraction
from upriver.runtime.progress import Progress, Say, mute
from upriver.runtime.split import LAYER_SCORES_BYTES, SCORES_BYTES, SUM, Asked, TraceSplit, split_trace
from upriver.tensors import Scratch, on_cpu
from upriver.text.batch import Sequences


class Job(NamedTuple):
    """What one trace works on, decided before it starts."""

    stage: Artifact
    model: Model
    layers: list[Layer]
    data: Sequences
    queries: Measured
    factors: Factors
    rows: np.ndarray  # the sequences that are scored
    opts: TraceOptions
    progress: Progress
    split: TraceSplit

    @property
    def damping(self) -> Damping:
        return Damping(0.0, False) if self.opts.curvature == "identity" else Damping.parse(self.opts.damping)

    @property
    def scan_dtype(self) -> str:
        return self.opts.dtype or self.factors.options.dtype

    @property
    def rank(self) -> int | None:
        return rank_within(self.layers, self.opts)

    @property
    def solver(self) -> Solver:
        asked = self.model, self.layers, self.factors, self.queries
        return Solver(*asked, self.opts.curvature, self.damping, self.split.batch_tokens)

    def open(self, name: str, **how: Any) -> Artifact:
        """Open an inner stage; one that was begun with another division of the work is begun again."""
        return Artifact.open(
            self.stage.path / name, name.split("/")[0], self.stage.key | {"split": how}, overwrite=True
        )


def rank_within(layers: list[Layer], opts: TraceOptions) -> int | None:
    """The rank asked for, or the highest that a layer can have; None: full."""
    return None if opts.rank == "full" else min(opts.rank, max(min(x.O, x.I) for x in layers))


def divide(
    model: Model,
    layers: list[Layer],
    data: Sequences,
    queries: Measured,
    opts: TraceOptions,
    dtype: str,
    folder: Path | None = None,
    say: Say = mute,
) -> TraceSplit:
    """How a trace divides its work so that it stays within the memory.

    Args:
        dtype: of the scan.
        folder: of the trace, which may have begun with a division; None: a new one.
    """
    asked = Asked(len(queries), int(np.max(queries.lengths)), rank_within(layers, opts), opts.layer_scores)
    memory = memory_budget(model, data, opts.batch_tokens, opts.memory, dtype)
    shape = _shape(model, layers, data, queries, dtype)

    def make() -> TraceSplit:
        return split_trace(shape, asked, memory)

    split = settled_split(folder, TraceSplit, make, memory, say) if folder else make()
    settle(split.peak, memory, model.device)
    return split


def _shape(model: Model, layers: list[Layer], data: Sequences, queries: Measured, dtype: str) -> Shape:
    """As seen on the corpus, with the activations of the longest query where it is longer than every sequence."""
    shape, longest = model_shape(model, layers, data, [dtype]), int(np.argmax(queries.lengths))
    if queries.lengths[longest] <= np.max(data.lengths_N):
        return shape
    asked = batch_shape(model, layers, queries.batch([longest]), lambda b: weighted_measurement(model, b))
    return shape._replace(activation=max(shape.activation, asked.activation))


def solve_stage(job: Job) -> list[Path]:
    """Solve and compress every query, a chunk at a time; returns the files of the chunks."""
    stage = job.open("solved", bytes=job.split.solve_bytes)
    chunks = query_chunks(job.layers, job.queries, job.rank, job.split.solve_bytes)
    with dist.together(), job.progress("queries", len(job.queries)) as advance:
        for unit in dist.dealt(len(chunks)):
            if not stage.has(unit):
                stage.commit(unit, _solved(job, chunks[unit]))
            advance(len(chunks[unit]))
    return [stage.unit_path(unit) for unit in range(len(chunks))]


def _solved(job: Job, chunk: list[int]) -> Tensors:
    if job.rank is None:
        return {f"v:{name}": v for name, v in job.solver.full(chunk).items()}
    return job.solver.low_rank(chunk, job.rank)


def plan_routes(
    job: Job, solved: list[Path], batches: list[np.ndarray], queries: slice = slice(None)
) -> tuple[dict[str, Route], int]:
    """Each layer's order of contraction, for a batch of mean size, with its queries laid out; and how many batches wait."""
    M = float(np.mean([job.data.lengths_N[rows].sum() for rows in batches]))
    N = float(np.mean([len(rows) for rows in batches]))
    Q = len(range(len(job.queries))[queries])
    like = job.model.like
    asked = (Q, job.rank, job.split.dense_bytes, like.element_size(), not on_cpu(like), job.split.token_bytes)
    chosen = contraction(job.layers, M, N, *asked)
    routes = {
        x.name: route(chosen.orders[x.name], partial(read_solved, solved, x.name, queries), Q, like) for x in job.layers
    }
    return routes, chosen.hold


def scan_stage(job: Job, solved: list[Path], note: Say) -> Scanned:
    """Score every wanted sequence against all queries, in as few passes as memory allows, committed unit by unit."""
    batches = job.data.plan(job.split.batch_tokens, job.rows)
    Q, at_once = len(job.queries), job.split.scan_queries
    room, columns = (LAYER_SCORES_BYTES, len(job.layers)) if job.opts.layer_scores else (SCORES_BYTES, 1)
    units = split_units(batches, job.data.lengths_N, max(1, room // (SUM * at_once * columns)))
    parts = [slice(q, min(q + at_once, Q)) for q in range(0, Q, at_once)]
    passes = [Scan(_scan(job, solved, batches, units, part, note), len(units), part) for part in parts]
    return gather(passes, np.sort(job.rows), len(job.layers) if job.opts.layer_scores else None)


def _scan(
    job: Job,
    solved: list[Path],
    batches: list[np.ndarray],
    units: list[list[np.ndarray]],
    queries: slice,
    note: Say,
) -> Artifact:
    """One pass over the corpus for some of the queries."""
    divided = {"batch_tokens": job.split.batch_tokens, "queries": job.split.scan_queries}
    stage = job.open(f"scan/queries-{queries.start}-{queries.stop - 1}", **divided)
    routes, hold = plan_routes(job, solved, batches, queries)
    hold = evenly(hold, max(map(len, units)))
    counts = {order: sum(r.order == order for r in routes.values()) for order in ("tokens", "dense", "rebuilt")}
    waiting = f", for {hold} batches at a time" if hold > 1 else ""
    note("contraction: " + ", ".join(f"{n} layers by {order}" for order, n in counts.items() if n) + waiting)
    Q = queries.stop - queries.start
    name = "scan" if len(job.queries) == Q else f"scan, queries {queries.start + 1} to {queries.stop}"
    scratch = Scratch()
    left = [unit for unit in dist.dealt(len(units)) if not stage.has(unit)]
    with dist.together(), job.progress(name, tokens_of(job.data, [units[unit] for unit in left])) as advance:
        for unit in left:
            consumer = Score(routes, Q, job.opts.layer_scores, hold, scratch=scratch)
            sweep(job.model, job.layers, job.data, units[unit], consumer, Labels(), advance)
            stage.commit(unit, consumer.tensors())
    return stage


def evenly(hold: int, batches: int) -> int:
    """As few waits for ``batches`` as with ``hold`` at a time, and no longer than that takes."""
    return -(-batches // -(-batches // hold))


class Part(NamedTuple):
    """Some queries whose pairs have been rescored, and the file that holds them."""

    queries: list[int]
    path: Path

    def read(self) -> Rescored:
        found = read_tensors(self.path)
        rows_P, queries_P = found["rows_P"].numpy(), found["queries_P"].numpy()
        return Rescored(rows_P, queries_P, found["tokens_PT"], found["layers_PL"])


def rescore_stage(job: Job, wanted: list[np.ndarray]) -> list[Part]:
    """Full-rank scores of the wanted pairs, computed in the model's dtype, kept in float32; a chunk of queries at a time."""
    stage = job.open("rescored", bytes=job.split.rescore_bytes, batch_tokens=job.split.batch_tokens)
    chunks = _rescore_chunks(job, wanted)
    with dist.together(), job.progress("rescore", sum(len(rows) for rows in wanted)) as advance:
        for unit in dist.dealt(len(chunks)):
            if not stage.has(unit):
                found = _rescored(job, chunks[unit], wanted)
                stage.commit(unit, {k: torch.as_tensor(v) for k, v in found._asdict().items()})
            advance(sum(len(wanted[q]) for q in chunks[unit]))
    return [Part(queries, stage.unit_path(unit)) for unit, queries in enumerate(chunks)]


def _rescore_chunks(job: Job, wanted: list[np.ndarray]) -> list[list[int]]:
    """Chunks of queries that fit in memory at full rank and whose sequences make about one unit of work."""
    chunks: list[list[int]] = []
    for whole in query_chunks(job.layers, job.queries, None, job.split.rescore_bytes):
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
    found = rescore(job.model, job.layers, job.data, solved, pairs, job.split.batch_tokens)
    return found._replace(queries_P=np.array(chunk)[found.queries_P])
