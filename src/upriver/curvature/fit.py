"""Fit EK-FAC: covariances, their eigenbases, and the eigenvalues measured in them.

    for each group of layers that fits in memory:  covariance pass, eigendecompositions
    for each group of layers that fits in memory:  correction pass
    with ``until``: the same on twice the tokens, until the scores of the two halves of the sample agree

FACTORS/covariance/layers-A-B/    sums of A and S of a group; removed when the fit is done
FACTORS/correction/layers-A-B/    sums of squared rotated gradients; likewise
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.agreement import Agreement, agreement, denominators, probed, probes
from upriver.curvature.blocks import Moments
from upriver.curvature.consumers import Correction, Covariance
from upriver.curvature.factors import Factors, decomposed, read_moments
from upriver.model.calibrate import announce
from upriver.model.kept import Kept
from upriver.model.layers import Coverage, Layer, coverage
from upriver.model.load import Model
from upriver.model.memory import DIVISION, memory_budget, settle, settled_split
from upriver.model.shape import model_shape
from upriver.model.sweep import Labels, check_length, check_loss, doubled, split_units, sweep, tokens_of, tracked_layers
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, Tensors, discard, locked, opened, read_json, read_tensor, write_stream
from upriver.runtime.config import CONVENTIONS, FitOptions, options
from upriver.runtime.counts import Shape
from upriver.runtime.passes import request_for
from upriver.runtime.progress import Progress, Say, Times, mute, silent
from upriver.runtime.split import FitSplit, covariance_size, keeping, split_fit
from upriver.runtime.sums import accumulate, remaining
from upriver.runtime.system import available_memory, free_space, give_back, work_ended
from upriver.runtime.threads import one_core_each
from upriver.tensors import accumulator_dtype
from upriver.text.batch import Sequences

HELD_COPIES = 4  # of sums, while some are added to others; those of a correction are about as large at most
COVARIANCE_STREAM, CORRECTION_STREAM = 1, 2  # the two passes draw different labels


class Work(NamedTuple):
    """What a fit goes over, decided before it starts."""

    model: Model
    data: Sequences
    layers: list[Layer]
    shape: Shape
    units: list[list[np.ndarray]]
    rounds: list[int]  # how many of the units each round goes over
    labels: tuple[Labels, Labels]
    progress: Progress
    split: FitSplit
    kept: Kept | None = None

    @property
    def tokens(self) -> int:
        return tokens_of(self.data, self.units)

    @property
    def sequences(self) -> int:
        return sum(len(rows) for unit in self.units for rows in unit)

    @property
    def dtype(self) -> torch.dtype:
        return accumulator_dtype(self.model.dtype)

    def groups(self, parts: list[list[int]]) -> list[list[Layer]]:
        return [[self.layers[i] for i in part] for part in parts]

    def key(self, top: Artifact) -> dict[str, Any]:
        """The key of an inner stage; with the size of its batches, as sums of other batches must not be added to it."""
        return top.key | {"split": self.split.batch_tokens}

    def whole_key(self, top: Artifact) -> dict[str, Any]:
        """The key of what is made from all the units."""
        return self.key(top) | {"units": len(self.units)}


def fit(
    model: Model,
    data: Sequences,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> Factors:
    """Fit the EK-FAC factors of ``model`` on ``data`` into the folder ``out``; reuse what is there when it is the same.

    Args:
        given: ``layers``, ``fisher``, ``max_tokens``, ``until``, ``dtype``, ``batch_tokens``, ``seed``, ``memory``; see
            :class:`FitOptions`.

    Raises:
        InputError: an option, the model, or the folder cannot be used.
        NumericalError: a NaN or an infinity on the way.

    Example:
        >>> factors = up.fit(model, corpus, out="factors", layers="mlp", max_tokens=500_000)
    """
    opts, out = options(FitOptions, given), Path(out)
    check_length(model, data)
    key = {
        "model": model.fingerprint,
        "corpus": data.fingerprint,
        "kernel": model.attention,
        "options": opts.key(),
        "conventions": CONVENTIONS,
    }
    with locked(out):
        stage = Artifact.open(out, "fit", key, overwrite)
        if stage.done:
            dist.on_first(lambda: _tidy(out))  # a kill may have come between the two
            say(f"factors: {out} is complete and was made from the same inputs; used as it is")
            say(f"layers: {Coverage.of(stage.manifest['coverage']).line()}")
            said = stage.manifest["fit"]
            say(_convergence(said["halves"], said["tokens"] if opts.until else None))
        else:
            with model.computing_in(opts.dtype) as computing, ExitStack() as files:
                work = _work(out, computing, data, opts, progress, say)
                if again := _asked_again(work, opts, out):
                    work = work._replace(kept=files.enter_context(Kept(out, work.layers, again)))
                _run(stage, work, opts, say)
            work_ended()
    return Factors(out)


def _work(folder: Path, model: Model, data: Sequences, opts: FitOptions, progress: Progress, say: Say = mute) -> Work:
    layers = tracked_layers(model, data, opts.layers)
    shape = model_shape(model, layers, data)
    budget = memory_budget(model, data, opts.batch_tokens, opts.memory)
    split = settled_split(folder, FitSplit, lambda: split_fit(shape, budget), budget, say)
    settle(split.peak, budget, model.device)
    drawn = opts.fisher == "sampled"
    check_loss(model, data, drawn)
    labels = [Labels(opts.seed, stream) if drawn else Labels() for stream in (COVARIANCE_STREAM, CORRECTION_STREAM)]
    most = opts.max_tokens or int(data.lengths_N.sum(dtype=np.int64))
    segments = [data.sample(most, opts.seed)] if opts.until is None else doubled(data, most, opts.seed)
    parts = [split_units(data.plan(split.batch_tokens, rows), data.lengths_N) for rows in segments]
    rounds = np.cumsum([len(part) for part in parts]).tolist()
    units = [unit for part in parts for unit in part]
    return Work(model, data, layers, shape, units, rounds, (labels[0], labels[1]), progress, split)


def _asked_again(work: Work, opts: FitOptions, out: Path) -> set[Labels]:
    """Labels with which several passes go over the same tokens, so that what the layers see is kept on the disk."""
    first, second = work.labels
    again = keeping(
        work.shape, work.split, work.tokens, opts.dtype, first == second, opts.until is not None, free_space(out)
    )
    found = {first} if again.covariance else set()
    found |= {second} if again.correction else set()
    return found | ({Labels()} if again.correction and len(work.split.correction) > 1 else set())


def _run(stage: Artifact, work: Work, opts: FitOptions, say: Say) -> None:
    started, times = time.perf_counter(), Times()
    cover = coverage(work.model.module, work.layers)
    say(f"layers: {cover.line()}")
    say(
        f"fit: {'at most ' if opts.until else ''}{work.tokens:,} tokens in {work.sequences:,} of {len(work.data):,} "
        f"sequences, {opts.fisher} labels, seed {opts.seed}"
    )
    request = request_for(
        work.data.lengths_N, fit_tokens=work.tokens, dtype=opts.dtype, batch_tokens=opts.batch_tokens,
        own_labels=work.labels[0] == work.labels[1], rounds=opts.until is not None, space=free_space(stage.path),
    )  # fmt: skip
    announce(say, work.model, work.layers, work.data, request, work.split)
    clamped, halves = 0.0, {}
    for part in _rounds(stage, work):
        clamped = _bases(stage, part, times, keep=opts.until is not None)
        halves = dist.broadcast(_eigenvalues(stage, part, times))
        say(_convergence(halves, part.tokens if opts.until else None))
        if opts.until is not None and (halves["mean"] or -1.0) >= opts.until:
            break
    else:
        if opts.until is not None:
            say(f"the agreement asked for, {opts.until}, was not reached: there are no more tokens (see --max-tokens)")
    if clamped < -1e-6:
        say(f"rank-deficient covariance: negative eigenvalues down to {clamped:.1e} of the largest were set to zero")
    manifest = {
        "layers": [
            {"name": x.name, "shape": [x.O, x.I], "block": x.block, "kind": x.kind, "A_of": x.A_of} for x in part.layers
        ],
        "coverage": cover._asdict() | {"share": cover.share},
        "fit": {"sequences": part.sequences, "tokens": part.tokens, "halves": halves, "clamped": clamped},
        "data": getattr(part.data, "info", {}),
        "timings": times | {"passes": _passes(part.split), "total": time.perf_counter() - started},
    }

    def finish() -> None:
        stage.finish(manifest, "eigen/*", "correction/lam.safetensors")
        _tidy(stage.path)

    dist.on_first(finish)


def _passes(split: FitSplit) -> dict[str, int]:
    """How the work was divided, which changes no result."""
    parts = {"covariance": len(split.covariance), "correction": len(split.correction)}
    return parts | {"batch_tokens": split.batch_tokens}


def _rounds(top: Artifact, work: Work) -> Iterator[Work]:
    """The sample in each round, from the one that an earlier run had come to."""
    eigen = top.path / "eigen" / "key.json"
    summed = [int(p.stem.removeprefix("sum-")) for p in (top.path / "covariance").glob("layers-*/sum-*")]
    first = max(summed, default=0)
    if eigen.exists():
        first = max(first, read_json(eigen).get("units", 0))
    elif summed:  # stopped where the next round begins
        first += 1
    dist.barrier()  # all have read it before one goes on
    for count in work.rounds:
        if count >= min(first, work.rounds[-1]):
            yield work._replace(units=work.units[:count])


def _tidy(folder: Path) -> None:
    """Remove the sums of finished passes: all that counts of them is in ``eigen`` and ``lam``."""
    discard(folder / "covariance")
    _remove_parts(folder / "correction")
    (folder / DIVISION).unlink(missing_ok=True)


def _remove_parts(folder: Path) -> None:
    for sums in folder.glob("layers-*"):
        discard(sums)
    (folder / DIVISION).unlink(missing_ok=True)


def _convergence(halves: dict[str, Any], tokens: int | None) -> str:
    """How well the halves of the sample agree, and after how many tokens where that was looked for."""
    mean, worst = (
        "not known (too few sequences)" if x is None else f"{x:.3f}" for x in (halves["mean"], halves["worst"])
    )
    after = f" (after {tokens:,} tokens)" if tokens else ""
    return f"convergence: {halves['what']}: {mean}, worst layer {worst}{after}"


def _pass(top: Artifact, name: str, work: Work, group: list[Layer], make: Callable[[], Any]) -> Path:
    """One accumulating pass over the units of ``work`` for a group of layers, committed unit by unit; the file of the sums."""
    at, first = work.layers.index(group[0]), name == "covariance"
    labels = work.labels[not first]
    key = work.key(top) if first else work.whole_key(top)  # covariances go on from round to round
    stage = Artifact.open(top.path / name / f"layers-{at}-{at + len(group) - 1}", name, key, overwrite=True)
    label = name if len(group) == len(work.layers) else f"{name}, layers {at + 1} to {at + len(group)}"

    mine = dist.dealt(len(work.units))
    with work.progress(label, tokens_of(work.data, [work.units[u] for u in remaining(stage, mine)])) as advance:

        def compute(unit: int) -> Tensors:
            consumer = make()
            sweep(work.model, group, work.data, work.units[unit], consumer, labels, advance, work.kept)
            return {key: value.cpu() for key, value in consumer.result().items()}

        hold = _in_memory(work, group)
        return accumulate(stage, mine, len(work.units), compute, hold)


def _in_memory(work: Work, group: list[Layer]) -> bool:
    """Whether the sums of a group stay in memory from unit to unit: on an accelerator, where the memory beside it is free."""
    if work.model.device.type == "cpu":
        return False
    room = available_memory()
    return room is not None and HELD_COPIES * covariance_size(group) < room


def _bases(top: Artifact, work: Work, times: Times, keep: bool) -> float:
    """Covariance pass and eigendecompositions, group by group; returns the most negative share of an eigenvalue.

    Args:
        keep: the sums, because a next round adds to them.
    """
    stage = Artifact.open(top.path / "eigen", "eigen", work.whole_key(top), overwrite=True)
    for group in work.groups(work.split.covariance):
        if all(stage.has(work.layers.index(x)) for x in group):
            continue
        with times("covariance"):
            sums = _pass(top, "covariance", work, group, partial(Covariance, work.dtype))
            give_back()
        with times("eigendecomposition"):
            _decompose(stage, work, group, sums)
            give_back()
        if not keep:
            dist.on_first(lambda done=sums.parent: discard(done))
    found = []
    for unit in range(len(work.layers)):
        with opened(stage.unit_path(unit)) as file:
            found.append(float(file.get_tensor("clamped")))
    return min(found)


def _decompose(stage: Artifact, work: Work, group: list[Layer], sums: Path) -> None:
    """Eigendecompose ``A`` and ``S`` of every layer: on the CPU one matrix on each core, with one thread."""
    mine = [group[i] for i in dist.dealt(len(group))]
    mine.sort(key=lambda x: -max(x.O, x.I))
    at_once = work.split.eigen_workers if work.model.device.type == "cpu" else 1

    def decompose(x: Layer) -> None:
        unit = work.layers.index(x)
        if not stage.has(unit):
            stage.commit(unit, decomposed(x, sums, work.sequences, work.model))

    shown = work.progress("eigendecomposition", len(group))
    with dist.together(), shown as advance, one_core_each(at_once) as pool:
        for _ in pool.map(decompose, mine):
            advance(1)


def _eigenvalues(top: Artifact, work: Work, times: Times) -> dict[str, Any]:
    """The correction pass, group by group; writes ``lam`` of every layer and returns how well the halves' scores agree."""
    files, pairs = [], []
    for group in work.groups(work.split.correction):
        moments = read_moments(top.path, work.layers, group, work.model.like)
        with times("correction"):
            make = partial(Correction, work.dtype, moments)
            sums = _pass(top, "correction", work, group, make)
        with times("agreement"):
            pairs.append(_probe(work, group, moments, sums))
        files += [(sums, x) for x in group]
    dist.on_first(lambda: _write_lam(top.path / "correction" / "lam.safetensors", files))
    return agreement(pairs)


def _write_lam(path: Path, files: list[tuple[Path, Layer]]) -> None:
    sums = {x.name: file for file, x in files}

    def lam(name: str) -> Tensor:
        return read_tensor(sums[name], f"lam:{name}").sum(0) / read_tensor(sums[name], "sequences").sum()

    forms = {}
    for file, x in files:
        with opened(file) as held:
            forms[x.name] = (held.get_slice(f"lam:{x.name}").get_dtype(), [x.O, x.I])
    write_stream(path, forms, lam)


def _probe(work: Work, group: list[Layer], moments: dict[str, Moments], sums: Path) -> Tensor | None:
    """Scores of a few sequences on each other by the eigenvalues of either half, ``[2, L, P]``; None when a half is empty."""
    if not int(read_tensor(sums, "sequences").min()):
        return None
    at_once = work.split.compared
    consumer = Agreement(moments, denominators(sums, group), at_once)
    batches = []
    if work.labels[1] == Labels():  # none of which holds two sequences, where they are long
        batches = probed([rows for unit in work.units for rows in unit], work.sequences, at_once)
    batches = batches or probes(len(work.data), work.sequences, at_once)
    sweep(work.model, group, work.data, batches, consumer, Labels(), kept=work.kept)
    return consumer.result() if batches else None


def fit_diagonal(
    model: Model, data: Sequences, factors: Factors, memory: str | None = None, progress: Progress = silent
) -> None:
    """Measure the diagonal of the Fisher in the weights' own basis, on the sample that the factors were fitted on."""
    factors.check(model, data)
    top = Artifact(factors.path, factors.manifest["key"])
    lam = top.path / "diagonal" / "lam.safetensors"
    if lam.exists():
        dist.on_first(lambda: _remove_parts(lam.parent))  # a kill may have come between the two
        return
    opts = factors.options.model_copy(update={"memory": memory})
    with locked(top.path), model.computing_in(opts.dtype) as computing:
        factors.check_unchanged()
        work = _work(lam.parent, computing, data, opts, progress)
        batches = data.plan(work.split.batch_tokens, _fitted(data, factors))
        work = work._replace(units=split_units(batches, data.lengths_N))
        files = []
        for group in work.groups(work.split.correction):
            sums = _pass(top, "diagonal", work, group, partial(Correction, work.dtype, None))
            files += [(sums, x) for x in group]
        dist.on_first(lambda: _write_lam(lam, files))
        dist.on_first(lambda: _remove_parts(lam.parent))
        dist.barrier()


def _fitted(data: Sequences, factors: Factors) -> np.ndarray:
    """The sequences that a fit had come to when it was done (``until``)."""
    return data.sample(factors.manifest["fit"]["tokens"], factors.options.seed)
