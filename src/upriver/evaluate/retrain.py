"""Retraining as ground truth: train on subsets, measure ``f`` of every query, and keep it all in a bank.

Axes: S subsets, N sequences, Q queries.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upriver.errors import ConfigError, NumericalError
from upriver.evaluate.lds import Bank
from upriver.evaluate.training import Trainer
from upriver.influence.queries import Measured, measurements
from upriver.model.fingerprint import content
from upriver.model.model import Model
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, Tensors, atomic, digest, refuse_inside
from upriver.runtime.progress import Advance, Progress, silent
from upriver.runtime.units import Claims, shared

Train = Callable[[np.ndarray, int], Model]  # (rows to train on, seed) -> the trained model


def leave_out(N: int, k: int = 1, count: int | None = None, seed: int = 0) -> np.ndarray:
    """Subsets without ``k`` sequences each, after all of them together: bool ``[1 + S, N]``.

    Args:
        count: so many random ones; None: consecutive ones, until each has been left out once.

    Example:
        >>> up.leave_out(3).sum(1)
        array([3, 2, 2, 2])
    """
    if not 0 < k < N:
        raise ConfigError(f"some but not all sequences can be left out: got {k} of {N}")
    rng = np.random.default_rng(seed)
    out = [np.arange(at, min(at + k, N)) for at in range(0, N, k)]
    if count is not None:
        out = [rng.choice(N, k, replace=False) for _ in range(count)]
    masks_SN = np.ones((1 + len(out), N), bool)
    for mask_N, rows in zip(masks_SN[1:], out, strict=True):
        mask_N[rows] = False
    return masks_SN


def random_subsets(N: int, count: int, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """``count`` random subsets of a share of the sequences, half of them by default: bool ``[S, N]``."""
    size = round(share * N)
    if not 0 < size < N:
        raise ConfigError(f"a subset holds some but not all of the sequences: got the share {share} of {N}")
    ranks_SN = np.random.default_rng(seed).random((count, N)).argsort(1).argsort(1)
    return ranks_SN < size


def retrain(
    train: Train,
    subsets: np.ndarray,
    queries: Measured,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    made_from: Any = None,
    progress: Progress = silent,
) -> Bank:
    """Train on every subset with every seed, and measure ``f`` of every query: a row of the bank for each model.

    It goes on after the last model that was finished.  Several processes that are given the same call share the work: each takes
    models that no other has taken, and all of them return the whole bank.

    Args:
        train: :class:`Trainer`, or any function of the rows and a seed.
        subsets: bool ``[S, N]``: what each model is trained on; `leave_out` and `random_subsets` make them.
        made_from: whatever JSON can write that names what ``train`` depends on, such as a version; a bank of another one is
            refused.  A :class:`Trainer` and the source of a function are told without it.

    Raises:
        ConfigError: subsets or seeds that are none.
        MismatchError: the folder holds another bank, or something else.
        NumericalError: a measurement that is no number.

    Example:
        >>> bank = up.retrain(train, up.random_subsets(len(corpus), 100), queries, "bank", seeds=(0, 1))
    """
    masks_SN, out, seeds = np.asarray(subsets), Path(out), [int(seed) for seed in seeds]
    if masks_SN.ndim != 2 or masks_SN.dtype != bool or not masks_SN.any(1).all() or not len(masks_SN) or not seeds:
        raise ConfigError(
            f"subsets are true where a sequence is trained on, [subsets, sequences], none of them empty, with at least one seed: "
            f"got {masks_SN.dtype} {masks_SN.shape} and {len(seeds)} seeds"
        )
    made = train.fingerprint if isinstance(train, Trainer) else digest(content(train))
    key = {
        "train": [made, made_from],
        "subsets": digest([masks_SN.shape, np.packbits(masks_SN, axis=1).tolist()]),
        "seeds": seeds,
        "queries": queries.fingerprint,
    }
    order = [(seed, subset) for seed in seeds for subset in range(len(masks_SN))]

    def finish(stage: Artifact) -> None:
        if not stage.done:
            values = [stage.read(model)["f"].numpy() for model in range(len(order))]
            masks = masks_SN[[subset for _, subset in order]]
            with atomic(out / "bank.parquet") as temporary:
                Bank.of(masks, values, [seed for seed, _ in order], queries.ids).write(temporary)
            stage.finish({"models": len(order), "sequences": masks_SN.shape[1], "queries": queries.ids})
        for model in range(len(order)):
            stage.unit_path(model).unlink(missing_ok=True)

    refuse_inside(out)
    with Claims(out) as claims, progress("models", len(order)) as advance:
        with nullcontext() if dist.world() > 1 else claims.first():
            stage = Artifact.open(out, "bank", key)
        if not stage.done:
            shared(stage, claims, len(order), lambda model: _measured(train, masks_SN, *order[model], queries, advance))
            with nullcontext() if dist.world() > 1 else claims.first():
                dist.on_first(lambda: finish(stage))
    return Bank.read(out)


def _measured(
    train: Train, masks_SN: np.ndarray, seed: int, subset: int, queries: Measured, advance: Advance
) -> Tensors:
    f_Q = measurements(train(np.flatnonzero(masks_SN[subset]), seed), queries)
    if not np.isfinite(f_Q).all():
        raise NumericalError(
            f"a measurement is no number: got {f_Q.tolist()} from the model of subset {subset}, seed {seed}; lower the rate"
        )
    advance(1)
    return {"f": torch.from_numpy(f_Q)}
