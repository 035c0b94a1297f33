"""What a trace is planned by: its scan, run over one batch; how it divides its work; and what ``upriver plan`` shows."""

from functools import partial
from pathlib import Path

import numpy as np

from upriver.curvature.choose import BLOCKS, EXPECTED
from upriver.curvature.combined import TIMES
from upriver.curvature.consumers import FIT_PROBES
from upriver.errors import ConfigError
from upriver.influence.job import Given, rank_within
from upriver.influence.queries import Measured, parts, weighted_measurement
from upriver.influence.score import Score, route
from upriver.model.check import tracked_layers
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.model.planned import Probe, memory_budget, plan_config, plan_here, settled
from upriver.model.shape import batch_shape, model_shape
from upriver.model.sweep import Consumer, Source
from upriver.runtime.config import TraceOptions
from upriver.runtime.cost import Asked, contraction, orders
from upriver.runtime.divide import Division, divide_trace
from upriver.runtime.hardware import hardware
from upriver.runtime.plan import Plan, Request, held_out_tokens, plan_run, request_for
from upriver.tensors import LowRank, on_cpu
from upriver.text.batch import Sequences


def divide(asked: Given, layers: list[Layer], folder: Path | None) -> Division:
    """How a trace divides its work so that it stays within the memory, and in which type it looks again at the top.

    Where the model does not fit in float32, its queries and the second look are left in the type of the scan, which only
    solvers that go layer by layer can do with.

    Args:
        folder: of the trace, which may have begun with a division; None: a new one.

    Raises:
        ConfigError: the memory is too small.
    """
    model, data, queries, opts, scan = asked.model, asked.data, asked.queries, asked.opts, str(asked.opts.dtype)
    shape = model_shape(model, layers, data, [scan])
    for part in parts(queries, range(len(queries))):
        longest = part.rows[np.argmax(part.lengths[part.rows])]
        if part.lengths[longest] > np.max(data.lengths_N):  # which keeps more than any sequence
            batch = part.batch(np.array([longest]))
            long = batch_shape(model, layers, batch, lambda b: weighted_measurement(model, b))
            shape = shape._replace(activation=max(shape.activation, long.activation))
    columns = len(queries) * len(opts.dampings)
    wanted = Asked(
        columns,
        int(np.max(queries.lengths)),
        rank_within(layers, opts),
        opts.layer_scores,
        len(opts.dampings) * opts.unit_norm,
    )
    by_layer = opts.curvature in (*BLOCKS, "tracincp") and not opts.refine and not opts.combine
    rougher = [scan] if scan == "bfloat16" and asked.exact == "float32" and by_layer else []
    for exact in (asked.exact, *rougher):
        budget = memory_budget(model, data, opts.batch, opts.memory, scan, exact)
        try:
            made = divide_trace(shape, wanted, budget)
            break
        except ConfigError:
            if exact == [asked.exact, *rougher][-1]:
                raise
    found = settled(folder, made, model.device, asked.say) if folder else made
    if found.exact != asked.exact:
        asked.say(f"memory: the model does not fit in {asked.exact}: questions and the top are in {found.exact} too")
    return found


def request(
    data: Sequences, rows: np.ndarray, queries: Measured, opts: TraceOptions, layers: list[Layer], fitted: int
) -> Request:
    """What is planned of the trace; ``fitted``: tokens that the factors were fitted on, or a solver goes over."""
    held_out = min(
        held_out_tokens(opts.held_out, len(queries)), max(0, int(data.lengths_N.sum(dtype=np.int64)) - fitted)
    )
    return request_for(
        np.asarray(data.lengths_N)[rows], fit=False, queries=len(queries), columns=len(queries) * len(opts.dampings),
        rank=rank_within(layers, opts), top=opts.top, fit_tokens=fitted, scan_dtype=str(opts.dtype),
        refine=EXPECTED if opts.refine == "auto" else opts.refine or len(TIMES) * bool(opts.combine),
        refine_tokens=opts.combine or opts.refine_tokens or 0,
        held_out=held_out, layer_scores=opts.layer_scores,
        norms=len(opts.dampings) * opts.unit_norm,
        query_tokens=max(1, round(float(np.mean(queries.lengths)))), batch_tokens=opts.batch_tokens,
    )  # fmt: skip


def scan_probe(asked: Asked) -> Probe:
    """The scan with queries of zeros, which take as long as any; those that are multiplied out are so for one batch."""

    def probe(model: Model, layers: list[Layer], source: Source, rows: np.ndarray) -> tuple[Consumer, float]:
        like, Q, R = model.like, asked.queries, asked.rank
        M, N = float(source.tokens(rows)), float(len(rows))
        chosen = contraction(layers, M, N, asked, number=like.element_size(), at_hand=not on_cpu(like)).orders
        zeros = {
            x.name: like.new_zeros(Q, x.O, x.I)
            if R is None
            else LowRank(like.new_zeros(Q, x.O, R), like.new_zeros(Q, R, x.I))
            for x in layers
        }
        routes = {x.name: route(chosen[x.name], partial(zeros.__getitem__, x.name), Q, like) for x in layers}
        work = sum(getattr(orders(x.O, x.I, M * x.rows, N, Q, R or 1), chosen[x.name]) for x in layers)
        return Score(routes, Q, False), 2.0 * work

    return probe


def plan_model(
    model: Model | Path, data: Sequences, spec: str | None, request: Request, hardware_name: str | None, left: int = 0
) -> Plan:
    """What ``upriver plan`` shows: any model, also one of which there is only a configuration, on any machine.

    Args:
        model: a loaded model, or the path of a configuration (:func:`upriver.model.shape.config_only`).
        spec: layers; None: as of a fit.
        hardware_name: an entry of the table of machines, such as ``h100x8``; None: this machine, measured.
        left: bytes in use here that will not be in a run's own process.

    Raises:
        ConfigError: no such hardware, or the run cannot be kept within the memory.
        ModelError: the configuration cannot be used, or there is no such layer.
    """
    machine = hardware(hardware_name) if hardware_name else None
    if isinstance(model, Path):
        return plan_config(model, spec or "mlp", request, machine)
    layers = tracked_layers(model, data, spec or model.default_layers, request.blocks)
    if machine is None:
        probes = FIT_PROBES | ({"scan": scan_probe(request.asked)} if request.queries else {})
        return plan_here(model, layers, data, request, probes, left=left)
    return plan_run(request, model_shape(model, layers, data, [request.dtype, request.scan]), machine)
