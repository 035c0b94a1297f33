"""The scan: one pass over the corpus scores every sequence against every solved query, a unit of consecutive rows at a time.

SCORES/scan/layers-A-B/unit-K    ``scores`` of the rows of unit K, in their order, by a group of layers

Scores of a sequence add up over groups of layers, and over checkpoints; units follow each other, so that the tables are
written and the extremes are found a unit at a time, whatever the size of the corpus.

Axes: N scanned sequences, C those of a unit, Q columns (a query, for each damping), L layers.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from upriver.errors import NumericalError
from upriver.influence.job import Job
from upriver.influence.normed import Lengths, Normed, unit_norm
from upriver.influence.score import Route, Score, route
from upriver.influence.solve import read_solved
from upriver.model.sweep import Source, sweep
from upriver.runtime.artifact import Tensors, read_tensor
from upriver.runtime.cost import HANDED, SUM, Asked
from upriver.runtime.divide import LAYER_SCORES_BYTES, SCORES_BYTES, Budget, scan_held
from upriver.runtime.progress import Say
from upriver.runtime.units import each, remaining
from upriver.tensors import Scratch, on_cpu
from upriver.text.candidates import Best

SAMPLE = 64  # random sequences that are rescored with the top, to tell the error of the low rank


class Part(NamedTuple):
    """The units of one pass: a file each, by which layers."""

    files: list[Path]
    layers: slice


class Scanned(NamedTuple):
    """Raw scores of the scanned sequences on the disk, unit by unit: rows ascending, a score for each column."""

    units: list[np.ndarray]
    parts: list[Part]
    n_columns: int
    n_layers: int | None  # where scores are kept by layer
    energy_Q: np.ndarray | None = None  # of each column's query, where unit-norm scores are asked for

    @property
    def rows_N(self) -> np.ndarray:
        return np.concatenate(self.units)

    def scores(self, unit: int) -> np.ndarray:
        """``[C, Q]``."""
        return sum(read_tensor(part.files[unit], "scores") for part in self.parts).numpy()  # type: ignore[union-attr]

    def by_layer(self, unit: int) -> np.ndarray:
        """``[C, Q, L]``."""
        assert self.n_layers is not None
        out_CQL = np.zeros((len(self.units[unit]), self.n_columns, self.n_layers), np.float32)
        for part in self.parts:
            out_CQL[:, :, part.layers] += read_tensor(part.files[unit], "layers").numpy()
        return out_CQL

    def own(self, unit: int) -> np.ndarray:
        """Self-influence of the sequences for each damping, ``[C, D]``, where unit-norm scores are asked for."""
        return sum(read_tensor(part.files[unit], "self") for part in self.parts).numpy()  # type: ignore[union-attr]

    def unit_norm(self, unit: int) -> np.ndarray:
        """Unit-norm scores ``[C, Q]``."""
        assert self.energy_Q is not None
        return unit_norm(self.scores(unit), self.own(unit), self.energy_Q)

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows of a unit, and their scores."""
        for unit, rows_C in enumerate(self.units):
            yield rows_C, self.scores(unit)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The scores ``[len(rows), Q]`` of some of the sequences, given by their rows in the corpus."""
        out = np.empty((len(rows), self.n_columns), np.float32)
        for unit, rows_C in enumerate(self.units):
            at = np.flatnonzero((rows >= rows_C[0]) & (rows <= rows_C[-1]))
            if len(at):
                out[at] = self.scores(unit)[np.searchsorted(rows_C, rows[at])]
        return out

    def extremes(self, top: int, queries: int) -> list[np.ndarray]:
        """For each query the ``top`` most positive and the ``top`` most negative sequences; ties by sequence."""
        N = sum(map(len, self.units))
        ends = [(Best(min(top, N)), Best(min(top, N))) for _ in range(queries)]
        for rows_C, scores_CQ in self.chunks():
            before_C = (np.iinfo(np.int64).max - rows_C).astype(
                np.uint64
            )  # of equal lowest scores the later ones are kept
            for (high, low), score_C in zip(ends, np.ascontiguousarray(scores_CQ.T), strict=False):
                high.add(score_C, rows_C)
                low.add(-score_C, rows_C, before_C)
        return [np.union1d(high.places, low.places) for high, low in ends]

    def random_rows(self, seed: int) -> np.ndarray:
        """A random few of the scanned sequences, on which the error of the low rank is measured; ascending."""
        rows_N = self.rows_N
        return np.sort(rows_N[np.random.default_rng(seed).choice(len(rows_N), min(SAMPLE, len(rows_N)), replace=False)])


def scan(job: Job, solved: list[Path], say: Say) -> list[Part]:
    """Score the rows of the job against all columns: once over the corpus for each group of layers that fits in memory."""
    source = Source.of(job.data, job.rows, job.division.batch_tokens)
    units = scan_units(job)
    parts = []
    for i, group in enumerate(job.division.groups["scan"]):
        layers = [job.layers[j] for j in group]
        routes, hold = plan_routes(job, solved, group)
        stage = job.open(f"scan/layers-{group[0]}-{group[-1]}", batch_tokens=source.batch_tokens, unit=len(units[0]))
        if not i:
            _tell(say, routes, hold)
        scratch, own = Scratch(), None
        if job.opts.unit_norm:
            assert job.by_layer is not None
            own = Lengths(job.by_layer, layers, job.dampings, job.model.like)
        name = "scan" if len(group) == len(job.layers) else f"scan, layers {group[0] + 1} to {group[-1] + 1}"
        with job.progress(name, sum(source.tokens(units[unit]) for unit in remaining(stage, len(units)))) as advance:

            def compute(unit: int) -> Tensors:
                consumer = Score(routes, len(job.columns), job.opts.layer_scores, hold, scratch=scratch)  # noqa: B023
                consumer = Normed(consumer, own) if own else consumer  # noqa: B023
                sweep(job.model, layers, source, units[unit], consumer, advance)  # noqa: B023
                return _finite(consumer.result())

            files = each(stage, len(units), compute)
        parts.append(Part(files, slice(group[0], group[-1] + 1)))
    return parts


def scan_units(job: Job) -> list[np.ndarray]:
    """Spans of the rows that are scored."""
    room, columns = (LAYER_SCORES_BYTES, len(job.layers)) if job.opts.layer_scores else (SCORES_BYTES, 1)
    most = max(1, room // (SUM * len(job.columns) * columns))
    return Source.of(job.data, job.rows, job.division.batch_tokens).units(job.opts.unit_tokens, most)


def plan_routes(job: Job, solved: list[Path], group: list[int]) -> tuple[dict[str, Route], int]:
    """Each layer's order of contraction, for a batch of mean size, with its queries laid out; and how many batches wait."""
    layers, like, Q = [job.layers[i] for i in group], job.model.like, len(job.columns)
    lengths_N = np.asarray(job.data.lengths_N)[job.rows]
    M = min(job.division.batch_tokens, int(lengths_N.sum(dtype=np.int64)))
    dtype = next(name for name, size in HANDED.items() if size == like.element_size())
    budget = Budget(
        0, 0, M, 1, dtype, sequences=max(1, round(M / float(lengths_N.mean()))), accelerator=not on_cpu(like)
    )
    chosen = scan_held(layers, Asked(Q, 1, job.rank, norms=job.norms), budget, M, job.division.scan_room)
    read = {x.name: partial(read_solved, solved, x.name) for x in layers}
    return {name: route(order, read[name], Q, like) for name, order in chosen.orders.items()}, chosen.hold


def _tell(say: Say, routes: dict[str, Route], hold: int) -> None:
    counts = {order: sum(r.order == order for r in routes.values()) for order in ("tokens", "dense", "rebuilt")}
    waiting = f", for {hold} batches at a time" if hold > 1 else ""
    say("contraction: " + ", ".join(f"{n} layers by {order}" for order, n in counts.items() if n) + waiting)


def _finite(found: Tensors) -> Tensors:
    bad = int((~torch.isfinite(found["scores"]).all(1)).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {len(found['scores'])} sequences got a score that is NaN or infinite; use --dtype float32"
        )
    return found
