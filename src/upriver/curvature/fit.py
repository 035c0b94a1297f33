"""Fit EK-FAC: covariances, their eigenbases, and the eigenvalues measured in them.

    for each group of layers that fits in memory:  covariance pass, eigendecompositions
    for each group of layers that fits in memory:  correction pass
    with ``until``: the same on twice the tokens, until the scores of the two halves of the sample agree

FACTORS/covariance/layers-A-B/    sums of A and S of a group; removed when the fit is done
FACTORS/correction/layers-A-B/    sums of squared rotated gradients; likewise

"""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from upriver.curvature.consumers import FIT_PROBES, Correction, Covariance, agreement, begun, compare, pool_means
from upriver.curvature.factors import Factors, decomposed, read_moments, write_lam
from upriver.curvature.rounds import convergence, doublings, labels_of, rounds
from upriver.kernels import one_core_each
from upriver.model.check import check_data, check_loss, check_moments, count_outputs, tracked_layers
from upriver.model.coverage import Coverage, coverage
from upriver.model.layers import Layer
from upriver.model.model import Model, check_model
from upriver.model.planned import announce, division_file, memory_budget, plan_here, settled
from upriver.model.shape import model_shape
from upriver.model.sweep import Consumer, Labels, Source, sweep
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, Tensors, discard, locked, read_tensor
from upriver.runtime.config import CONVENTIONS, FitOptions, options
from upriver.runtime.cost import CORRECTION, COVARIANCE, Spec
from upriver.runtime.device import float32_products, memory_told
from upriver.runtime.divide import Division, divide_fit
from upriver.runtime.plan import request_for
from upriver.runtime.progress import Progress, Say, Times, mute, silent
from upriver.runtime.system import give_back, work_ended
from upriver.runtime.units import remaining, total
from upriver.tensors import accumulator_dtype
from upriver.text.batch import Sequences
from upriver.text.examples import sequences

COVARIANCE_STREAM, CORRECTION_STREAM = 1, 2  # the two passes draw different labels


class Work(NamedTuple):
    """What a fit goes over, decided before it starts."""

    top: Artifact
    model: Model
    data: Sequences
    layers: list[Layer]
    units: list[np.ndarray]  # spans of the sample's rows
    labels: dict[str, list[Labels]]  # by pass: each batch goes through it with each of these
    division: Division
    progress: Progress

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate(self.units)

    @property
    def tokens(self) -> int:
        return int(self.data.lengths_N[self.rows].sum(dtype=np.int64))

    @property
    def draws(self) -> int:
        return len(self.labels["correction"])

    @property
    def dtype(self) -> torch.dtype:
        return accumulator_dtype(self.model.dtype)

    def groups(self, name: str) -> list[list[Layer]]:
        return [[self.layers[i] for i in group] for group in self.division.groups[name]]

    def open(self, name: str, **key: Any) -> Artifact:
        """An inner stage; sums of other batches or other units must not be added to its own."""
        divided = {"batch_tokens": self.division.batch_tokens, "unit": len(self.units[0]), **key}
        return Artifact.open(self.top.path / name, name.split("/")[0], self.top.key | divided, overwrite=True)


def fit(
    model: Model,
    data: Any,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> Factors:
    """Fit the EK-FAC factors of ``model`` on ``data`` into the folder ``out``; reuse what is there when it is the same.

    Args:
        data: a corpus, :class:`upriver.Examples`, or what these are made of: arrays, a data set, a ``DataLoader``.
        given: ``layers``, ``fisher``, ``draws``, ``max_tokens``, ``until``, ``blocks``, ``dtype``, ``tf32``,
            ``batch_tokens``, ``seed``, ``memory``; see :class:`FitOptions`.

    Raises:
        InputError: an option, the model, or the folder cannot be used.
        NumericalError: a NaN or an infinity on the way.
        ResourceError: the memory of the device ran out.

    Example:
        >>> factors = up.fit(model, corpus, out="factors", layers="mlp", max_tokens=500_000)
    """
    check_model(model)
    opts, out, data = model.settled(options(FitOptions, given)), Path(out), sequences(data)
    check_data(model, data)
    key = {
        "model": model.fingerprint,
        "corpus": data.fingerprint,
        "kernel": model.attention,
        "options": opts.key(),
        "conventions": CONVENTIONS,
    }
    with locked(out), memory_told("the fit", opts.batch // 2), float32_products(opts.tf32):
        stage = Artifact.open(out, "fit", key, overwrite)
        if stage.done:
            dist.on_first(lambda: _tidy(out))  # a kill may have come between the two
            say(f"factors: {out} is complete and was made from the same inputs; used as it is")
            said, cover = stage.manifest["fit"], Coverage.of(stage.manifest["coverage"])
            say(f"layers: {cover.line()}")
            say(convergence(said["halves"], said["tokens"] if opts.until else None))
        else:
            with model.computing_in(opts.dtype) as computing:
                _run(prepared(stage, computing, data, opts, progress, say), opts, say)
            work_ended()
    return Factors(out)


def prepared(top: Artifact, model: Model, data: Sequences, opts: FitOptions, progress: Progress, say: Say) -> Work:
    layers = tracked_layers(model, data, str(opts.layers), opts.blocks)
    check_moments(layers)
    check_loss(model, data, opts.fisher == "sampled")
    shape, budget = model_shape(model, layers, data), memory_budget(model, data, opts.batch, opts.memory)
    division = settled(top.path, divide_fit(shape, budget), model.device, say)
    outputs = count_outputs(model, data) if opts.fisher == "exact" else None
    streams = {"covariance": COVARIANCE_STREAM, "correction": CORRECTION_STREAM}
    labels = {name: labels_of(opts, stream, outputs) for name, stream in streams.items()}
    most = opts.max_tokens or int(data.lengths_N.sum(dtype=np.int64))
    unit = opts.unit_tokens
    samples = [data.sample(size, opts.seed) for size in (doublings(most, unit) if opts.until else [most])]
    added = [np.setdiff1d(rows, before) for before, rows in pairwise([samples[0][:0], *samples])]
    sources = [Source.of(data, rows, division.batch_tokens) for rows in added if len(rows)]
    return Work(top, model, data, layers, [u for s in sources for u in s.units(unit)], labels, division, progress)


def _run(work: Work, opts: FitOptions, say: Say) -> None:
    started, times, stage = time.perf_counter(), Times(), work.top
    cover = coverage(work.model.module, work.layers)
    say(f"layers: {cover.line()}")
    say(
        f"fit: {'at most ' if opts.until else ''}{work.tokens:,} tokens in {len(work.rows):,} of {len(work.data):,} "
        f"sequences, {opts.fisher} labels, seed {opts.seed}"
        + (f", {work.draws} passes a batch" if work.draws > 1 else "")
        + (f", A and S in {opts.blocks} diagonal blocks" if opts.blocks > 1 else "")
    )
    asked: dict[str, Any] = {"dtype": opts.dtype, "batch_tokens": opts.batch_tokens, "rounds": opts.until is not None}
    request = request_for(work.data.lengths_N, fit_tokens=work.tokens, memory=None, draws=work.draws, **asked)
    announce(say, lambda: plan_here(work.model, work.layers, work.data, request, FIT_PROBES, work.division))
    clamped, halves, part = 0.0, {}, work
    for count in rounds(work.top.path, work.units, work.data, opts):
        part = work._replace(units=work.units[:count])
        clamped = _bases(part, times, keep=opts.until is not None)
        halves = dist.broadcast(_eigenvalues(part, times))
        say(convergence(halves, part.tokens if opts.until else None))
        if opts.until is not None and (halves["mean"] or -1.0) >= opts.until:
            break
    else:
        if opts.until is not None:
            say(f"the agreement asked for, {opts.until}, was not reached: there are no more tokens (see --max-tokens)")
    if clamped < -1e-6:
        say(f"rank-deficient covariance: negative eigenvalues down to {clamped:.1e} of the largest were set to zero")
    passes = {name: len(found) for name, found in work.division.groups.items()}
    manifest = {
        "layers": [x.told() for x in part.layers],
        "coverage": cover._asdict() | {"share": cover.share},
        "fit": {
            "sequences": len(part.rows),
            "tokens": part.tokens,
            "halves": halves,
            "clamped": clamped,
            "blocks": opts.blocks,
        },
        "data": getattr(part.data, "info", {}),
        "n_train": len(part.data),
        "timings": times
        | {"passes": passes | {"batch_tokens": work.division.batch_tokens}, "total": time.perf_counter() - started},
    }

    def finish() -> None:
        stage.finish(manifest, "eigen/*", "correction/lam.safetensors")
        _tidy(stage.path)

    dist.on_first(finish)


def _tidy(folder: Path) -> None:
    """Remove the sums of finished passes: all that counts of them is in ``eigen`` and ``lam``."""
    discard(folder / "covariance")
    for sums in folder.glob("correction/layers-*"):
        discard(sums)
    division_file(folder).unlink(missing_ok=True)


def summed(work: Work, spec: Spec, group: list[Layer], make: Callable[[Tensors], Consumer], **key: Any) -> Path:
    """One pass over the units for a group of layers, committed unit by unit; the file of the sums."""
    at = work.layers.index(group[0])
    stage = work.open(f"{spec.name}/layers-{at}-{at + len(group) - 1}", **key)
    labels = work.labels.get(spec.name, work.labels["correction"])
    source = Source.of(work.data, work.rows, work.division.batch_tokens, *labels)
    label = spec.name if len(group) == len(work.layers) else f"{spec.name}, layers {at + 1} to {at + len(group)}"
    left = sum(source.tokens(work.units[unit]) for unit in remaining(stage, len(work.units)))
    with work.progress(label, left) as advance:

        def add(unit: int, sums: Tensors) -> None:
            sweep(work.model, group, source, work.units[unit], make(sums), advance)

        return total(stage, len(work.units), add, work.model.device)


def _bases(work: Work, times: Times, keep: bool) -> float:
    """Covariance pass and eigendecompositions, group by group; returns the most negative share of an eigenvalue.

    Args:
        keep: the sums, because a next round adds to them.
    """
    stage = work.open("eigen", units=len(work.units))
    for group in work.groups("covariance"):
        if all(stage.has(work.layers.index(x)) for x in group):
            continue
        with times("covariance"):
            sums = summed(work, COVARIANCE, group, lambda sums: Covariance(sums, work.dtype))
            give_back()
        with times("eigendecomposition"):
            _decompose(stage, work, group, sums)
            give_back()
        if not keep:
            dist.on_first(lambda done=sums.parent: discard(done))
    return min(float(read_tensor(stage.unit_path(unit), "clamped")) for unit in range(len(work.layers)))


def _decompose(stage: Artifact, work: Work, group: list[Layer], sums: Path) -> None:
    """Eigendecompose ``A`` and ``S`` of every layer: on the CPU one matrix on each core, with one thread."""
    mine = sorted((group[i] for i in dist.dealt(len(group))), key=lambda x: -max(x.O, x.I))
    at_once = work.division.eigen_workers if work.model.device.type == "cpu" else 1

    def decompose(x: Layer) -> None:
        unit = work.layers.index(x)
        if not stage.has(unit):
            stage.commit(unit, decomposed(x, sums, work.draws * len(work.rows), work.model))

    shown = work.progress("eigendecomposition", len(group))
    with dist.together(), shown as advance, one_core_each(at_once) as pool:
        for _ in pool.map(decompose, mine):
            advance(1)


def _eigenvalues(work: Work, times: Times) -> dict[str, Any]:
    """The correction pass, group by group; writes ``lam`` of every layer and returns how well the halves' scores agree."""
    files: dict[str, Path] = {}
    for group in work.groups("correction"):
        with times("correction"):
            moments = read_moments(work.top.path, work.layers, group, work.model.like)
            make = lambda sums, m=moments, of=group: Correction(begun(sums, of, work.model), work.dtype, m)  # noqa: E731
            sums = summed(work, CORRECTION, group, make, units=len(work.units))
            moments.clear()
            give_back()
        files |= dict.fromkeys((x.name for x in group), sums)
    pairs, means = [], pool_means(work.layers, files)
    for group in work.groups("agreement"):
        with times("agreement"):
            moments = read_moments(work.top.path, work.layers, group, work.model.like)
            pairs.append(
                compare(work.model, group, work.data, len(work.rows), moments, files, means, work.division.batch_tokens)
            )
            moments.clear()
            give_back()
    dist.on_first(lambda: write_lam(work.top.path / "correction" / "lam.safetensors", files, means))
    return agreement(pairs)
