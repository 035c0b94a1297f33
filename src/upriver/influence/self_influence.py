"""Self-influence of every sequence in one pass: ``grad L(z)^T (G + lambda I)^-1 grad L(z)``, loss and gradient norm beside it.

OUT/self/layers-A-B/unit-K    ``found`` and ``loss`` of the rows of unit K, in their order, by a group of layers

Axes: N sequences, O outputs and I inputs of a layer.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from upriver.curvature.base import Damping
from upriver.curvature.choose import BLOCKS, blocks
from upriver.curvature.consumers import SelfInfluence
from upriver.curvature.diagonal import fit_diagonal
from upriver.curvature.factors import Factors, read_moments
from upriver.errors import ConfigError, NumericalError
from upriver.influence.job import settled_options
from upriver.model.check import check_data, check_loss, tells_losses, tracked_layers
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.model.planned import memory_budget, settled
from upriver.model.shape import model_shape
from upriver.model.sweep import Source, sweep
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, Tensors, read_tensors
from upriver.runtime.config import PLAIN_GRADIENTS, TraceOptions, options
from upriver.runtime.cost import SELF_INFLUENCE, Shape
from upriver.runtime.device import float32_products, memory_told
from upriver.runtime.divide import divide_pass
from upriver.runtime.progress import Progress, Say, mute, show_bytes, show_flop, silent
from upriver.runtime.system import give_back
from upriver.runtime.units import each, remaining
from upriver.tensors import accumulator_dtype
from upriver.text.batch import Sequences

COLUMNS = ("self_influence", "loss", "gradient_norm")


def self_influence(
    model: Model,
    data: Sequences,
    factors: Factors | None = None,
    *,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> pd.DataFrame:
    """Self-influence, loss and gradient norm of every sequence, from one pass: a row each, in the order of ``data``.

    Self-influence is ``grad L(z)^T (G + lambda I)^-1 grad L(z)`` over the tracked layers, with ``L`` the loss summed over the
    sequence's tokens; divided by the number of training sequences it is the nats by which one more copy lowers its own loss.
    The norm is that of the gradient in the tracked layers.

    Args:
        factors: of the fit; None for the curvature ``identity``, whose self-influence is the squared norm.
        given: ``curvature`` (``ekfac``, ``kfac``, ``diagonal`` or ``identity``), ``damping``, ``layers``, ``dtype``, ``tf32``,
            ``batch_tokens``, ``memory``, ``unit_tokens``; see :class:`TraceOptions`.

    Raises:
        InputError: an option cannot be used, or the factors belong to another model.
        NumericalError: a NaN or an infinity on the way.
        ResourceError: the memory of the device ran out.

    Example:
        >>> up.self_influence(model, corpus, factors).sort_values("self_influence").tail(10)
    """
    opts = block_options(options(TraceOptions, given), model, factors)
    if factors:
        factors.check(model)
    with tempfile.TemporaryDirectory() as own:
        stage = Artifact.open(Path(dist.broadcast(own)), "self", {})
        found = measured(stage, model, data, factors, opts, progress, say)
        dist.barrier()  # the folder of the first process is gone after this
        return found


def block_options(opts: TraceOptions, model: Model, factors: Factors | None) -> TraceOptions:
    """The options with what they do not name."""
    check_block(opts)
    return settled_options(opts, model, factors, ())


def check_block(opts: TraceOptions) -> None:
    """Refuse a curvature that is not solved layer by layer, and several dampings.

    Raises:
        ConfigError: with the value.
    """
    if opts.curvature not in BLOCKS or opts.refine:
        got = f"{opts.curvature!r}{f' refined by {opts.refine} steps' if opts.refine else ''}"
        raise ConfigError(
            f"self-influence takes a curvature that is diagonal in a basis: got {got}; give {', '.join(BLOCKS)}"
        )
    if len(opts.dampings) > 1:
        raise ConfigError(f"self-influence takes one damping: got --damping {opts.damping}; give one of them")


def measured(
    stage: Artifact,
    model: Model,
    data: Sequences,
    factors: Factors | None,
    opts: TraceOptions,
    progress: Progress = silent,
    say: Say = mute,
) -> pd.DataFrame:
    """The pass, with its units in a folder of ``stage``; what an interrupted run had finished is taken up."""
    check_data(model, data)
    if opts.curvature == "diagonal" and factors:
        fit_diagonal(model, data, factors, opts.memory, progress)
    with (
        memory_told("self-influence", opts.batch // 2),
        float32_products(bool(opts.tf32)),
        model.computing_in(str(opts.dtype)) as computing,
    ):
        return _pass(stage, computing, data, factors, opts, progress, say)


def _pass(
    stage: Artifact,
    model: Model,
    data: Sequences,
    factors: Factors | None,
    opts: TraceOptions,
    progress: Progress,
    say: Say,
) -> pd.DataFrame:
    same = {x.name for x in factors.layers} if factors else None
    layers = tracked_layers(model, data, str(opts.layers), factors.options.blocks if factors else 1, same)
    shape = model_shape(model, layers, data)
    budget = memory_budget(model, data, opts.batch, opts.memory)
    division = settled(stage.path, divide_pass(shape, SELF_INFLUENCE, budget), model.device, say)
    groups = [[layers[i] for i in group] for group in division.groups[SELF_INFLUENCE.name]]
    check_loss(model, data, drawn=False)
    told = tells_losses(model, data)
    source = Source.of(data, np.arange(len(data)), division.batch_tokens if told else 1)
    units = source.units(opts.unit_tokens)
    say(_forecast(shape, groups, source, division.peak[SELF_INFLUENCE.name], told))
    sums: list[Tensors] = []
    for some in groups:
        at = layers.index(some[0])
        inner = _open(stage, f"layers-{at}-{at + len(some) - 1}", batch_tokens=source.batch_tokens, unit=len(units[0]))
        moments, inverse = _held(model, some, factors, opts) if remaining(inner, len(units)) else (None, {})
        label = "self-influence" if len(some) == len(layers) else f"self-influence, layers {at + 1} to {at + len(some)}"
        with progress(label, sum(source.tokens(units[unit]) for unit in remaining(inner, len(units)))) as advance:

            def compute(unit: int) -> Tensors:
                seen = SelfInfluence(moments, inverse, told)  # noqa: B023
                sweep(model, some, source._replace(loss=seen.loss), units[unit], seen, advance)  # noqa: B023
                return seen.result()

            files = each(inner, len(units), compute)
        parts = [read_tensors(file) for file in files]
        sums.append({name: torch.cat([part[name] for part in parts]) for name in ("found", "loss")})
        moments, inverse = None, {}
        give_back()
    found_N2 = torch.stack([x["found"] for x in sums]).sum(0).numpy()
    table = np.stack([found_N2[:, 0], sums[0]["loss"].numpy(), np.sqrt(found_N2[:, 1])], 1)
    bad = int((~np.isfinite(table).all(1)).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {len(table)} sequences got a self-influence that is NaN or infinite; use --dtype float32"
        )
    return pd.DataFrame(table, columns=pd.Index(COLUMNS))


def _forecast(shape: Shape, groups: list[list[Layer]], source: Source, peak: int, told: bool) -> str:
    """What the pass will take, in a line."""
    tokens, T = source.tokens(source.rows), source.tokens(source.rows) / len(source.rows)
    flop = 0.0
    for some in groups:
        own = sum(SELF_INFLUENCE.multiplications(x, T) for x in some)
        flop += 2 * tokens * (shape.forward(T) + shape.backward(T, some) + own)
    alone = "" if told else "; one sequence at a time, because the task does not tell the loss of each"
    return (
        f"self-influence: {len(groups)} x {tokens:,} tokens, {show_flop(flop)}, batches of {source.batch_tokens:,} tokens, peak "
        f"memory {show_bytes(peak)}{alone}"
    )


def _open(stage: Artifact, name: str, **how: Any) -> Artifact:
    return Artifact.open(stage.path / "self" / name, "self", stage.key | {"split": how}, overwrite=True)


def _held(model: Model, some: list[Layer], factors: Factors | None, opts: TraceOptions) -> tuple[Any, Tensors]:
    """The eigenbases of some layers (None: the weights' own), and what squares are weighted by there."""
    like, kind = model.like, opts.curvature
    curvature = blocks(kind, some, factors)
    damping = Damping(0.0, False) if kind in PLAIN_GRADIENTS else Damping.parse(opts.damping)
    dtype = accumulator_dtype(like.dtype)
    inverse = {x.name: curvature.block(x.name).denominator(damping).reciprocal().to(like.device, dtype) for x in some}
    if factors is None or kind not in ("ekfac", "kfac"):
        return None, inverse
    return read_moments(factors.path, factors.layers, some, like), inverse
