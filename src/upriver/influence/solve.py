"""The query side: each measurement's gradient, solved by any curvature and compressed once; the corpus only streams past it.

SCORES/solution/D/unit-K    full-rank solutions of some queries, for solvers that take long; D is the damping
SCORES/solved/D/unit-K      the same compressed: what the scan reads

Axes: Q queries, R rank, O outputs, I inputs of a layer.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Damping, Grads, compress
from upriver.errors import ConfigError, NumericalError
from upriver.influence.job import Job
from upriver.influence.queries import gradients, in_turn, query_chunks, token_gradients
from upriver.kernels import side_by_side
from upriver.model.layers import Layer
from upriver.runtime.artifact import Tensors, opened, read_tensor
from upriver.runtime.cost import SUM
from upriver.runtime.progress import show_bytes, silent
from upriver.runtime.units import each
from upriver.tensors import LowRank

VECTORS = 8  # that an iterative solver holds for each query: solution, residual, direction, products
STATS = "stats"  # in a file of solutions: what the solver says of them, as JSON in bytes


def solve(job: Job) -> list[Path]:
    """Solve and compress every query for every damping, a chunk at a time: the files of the chunks, in order of the columns."""
    chunks = query_chunks(job.layers, job.queries, job.rank, job.division.solve_bytes)
    files: list[Path] = []
    for number, damping in enumerate(job.dampings):
        if job.by_layer is not None:
            compute = partial(_by_layer, job, damping)
        else:
            found = solutions(job, number)
            if job.rank is None:
                files += found
                continue
            compute = partial(_compressed, job, found)
        stage = job.open(f"solved/{number}", bytes=job.division.solve_bytes)
        with job.progress("queries", len(job.queries)) as advance:
            files += each(stage, len(chunks), _noted(compute, chunks, advance))
    return files


def _noted(
    compute: Callable[[list[int]], Tensors], chunks: list[list[int]], advance: Callable
) -> Callable[[int], Tensors]:
    def unit(number: int) -> Tensors:
        found = compute(chunks[number])
        advance(len(chunks[number]))
        return found

    return unit


def _by_layer(job: Job, damping: Damping, chunk: list[int]) -> Tensors:
    """Some queries, solved by as many layers together as fit in the memory; on the device is what is being worked on."""
    out: Tensors = {}
    for layers in job.groups("queries"):
        if job.rank is None:
            out |= {f"v:{name}": v.cpu() for name, v in full(job, chunk, damping, layers).items()}
        else:
            out |= _low_rank(job, damping, chunk, layers)
    return out


def _low_rank(job: Job, damping: Damping, chunk: list[int], layers: list[Layer]) -> Tensors:
    found = token_gradients(job.model, layers, job.queries, chunk, job.division.batch_tokens)
    curvature, like, rank = job.by_layer, job.model.like, job.rank
    assert curvature is not None
    assert rank is not None

    def solve_one(x: Layer) -> Tensors:
        block = curvature.block(x.name).to(like)
        metric = block.basis or job.metric(x.name)
        low = block.solve_low_rank(found.pop(x, chunk, like), damping, min(rank, x.O, x.I), metric)
        U_QOR, V_QRI = _finite(x.name, low.U_QOR) * job.weight, _finite(x.name, low.V_QRI)
        return {f"U:{x.name}": U_QOR.cpu(), f"V:{x.name}": V_QRI.cpu()}

    return {name: x for solved in side_by_side(solve_one, layers, like.device) for name, x in solved.items()}


def _compressed(job: Job, solutions: list[Path], chunk: list[int]) -> Tensors:
    assert job.rank is not None
    out: Tensors = {}
    for x in job.layers:
        v_QOI = read_solved(solutions, x.name, slice(chunk[0], chunk[-1] + 1))
        assert isinstance(v_QOI, Tensor)
        low = compress(v_QOI.to(job.model.like), min(job.rank, x.O, x.I), job.metric(x.name))
        out |= {f"U:{x.name}": low.U_QOR, f"V:{x.name}": low.V_QRI}
    return out


def solutions(job: Job, number: int = 0) -> list[Path]:
    """The files of the full-rank solutions of a solver that goes over all layers at once; its own words are beside them."""
    each_bytes, room = VECTORS * SUM * sum(x.O * x.I for x in job.layers), job.division.room("queries")
    if room // 2 < each_bytes:
        raise ConfigError(
            f"the memory is too small for the solver {job.opts.curvature!r}: got {show_bytes(job.division.limit)}; it takes "
            f"{show_bytes(2 * each_bytes - room)} more: give more with --memory, or track fewer layers with --layers"
        )
    at_once = min(len(job.queries), room // 2 // each_bytes)
    chunks = in_turn(len(job.queries), at_once)

    def compute(chunk: list[int]) -> Tensors:
        q = gradients(job.model, job.layers, job.queries, chunk, job.division.batch_tokens)
        assert job.curvature is not None
        solution = job.curvature.solve(q, job.dampings[number])
        told = json.dumps({"converged": solution.converged, **solution.stats})
        out = {f"v:{name}": _finite(name, v_QOI) for name, v_QOI in solution.value.items()}
        return out | {STATS: torch.tensor(list(told.encode()))}

    stage = job.open(f"solution/{number}", queries=at_once)
    done = all(stage.has(unit) for unit in range(len(chunks)))  # they are asked for again by every later stage
    with (silent if done else job.progress)("solving", len(job.queries)) as advance:
        return each(stage, len(chunks), _noted(compute, chunks, advance))


def told(job: Job) -> list[dict[str, Any]]:
    """What the solver says of each query's solution: ``converged``, ``why`` it is not, ``residual`` and ``steps``."""
    if job.by_layer is not None:
        return [{"converged": True} for _ in job.queries.ids]
    out: list[dict[str, Any]] = []
    for path in solutions(job):
        said = json.loads(bytes(read_tensor(path, STATS).tolist()))
        with opened(path) as file:
            count = file.get_slice(f"v:{job.layers[0].name}").get_shape()[0]
        for i in range(count):
            of_one = {name: x[i] if isinstance(x, list) and len(x) == count else x for name, x in said.items()}
            out.append(of_one | {"products": said.get("products", 0) / count})
    return out


def full(job: Job, chunk: list[int], damping: Damping | None = None, layers: list[Layer] | None = None) -> Grads:
    """Solutions of consecutive queries in some layers (None: all), ``[Q, O, I]`` each, by the first damping or another."""
    layers = job.layers if layers is None else layers
    if job.by_layer is None:
        files = solutions(job)
        found = {x.name: read_solved(files, x.name, slice(chunk[0], chunk[-1] + 1)) for x in layers}
        return {name: x.to(job.model.like) for name, x in found.items() if isinstance(x, Tensor)}
    tokens, like = token_gradients(job.model, layers, job.queries, chunk, job.division.batch_tokens), job.model.like
    out: Grads = {}
    for x in layers:
        block = job.by_layer.block(x.name).to(like)
        v_QOI = block.solve_tokens(tokens.pop(x, chunk, like), damping or job.dampings[0])
        out[x.name] = _finite(x.name, v_QOI).mul_(job.weight)
    return out


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"the solved query of layer {name!r} holds NaN or infinity; give a larger --damping")
    return tensor


def read_solved(paths: list[Path], layer: str, columns: slice = slice(None)) -> LowRank | Tensor:
    """One layer's solved ``columns`` from the files of all chunks: low-rank factors, or ``v_QOI`` at full rank."""
    with ExitStack() as stack:
        files = [stack.enter_context(opened(path)) for path in paths]

        def wanted(part: str) -> Tensor:
            found = [_rows(file, f"{part}:{layer}", *at) for file, *at in zip(files, starts, ends, strict=True)]
            held = [rows for rows in found if len(rows)]
            return held[0] if len(held) == 1 else torch.cat(held)

        whole = f"v:{layer}" in files[0].keys()  # noqa: SIM118 - not a mapping
        sizes = [file.get_slice(f"{'v' if whole else 'U'}:{layer}").get_shape()[0] for file in files]
        first, last, _ = columns.indices(sum(sizes))
        before = np.cumsum([0, *sizes])[:-1]
        starts, ends = np.clip(first - before, 0, sizes).tolist(), np.clip(last - before, 0, sizes).tolist()
        return wanted("v") if whole else LowRank(wanted("U"), wanted("V"))


def _rows(file: Any, name: str, start: int, end: int) -> Tensor:
    """Some rows of a tensor in an open file: only they are read."""
    rows = file.get_slice(name)
    return file.get_tensor(name) if end - start == rows.get_shape()[0] else rows[start:end]
