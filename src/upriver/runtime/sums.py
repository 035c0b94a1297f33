"""Sums over units of work, on the disk: added up in the order of the units, so that a run that stops goes on to the same bits."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from torch import Tensor

from upriver.errors import StorageError
from upriver.runtime import dist
from upriver.runtime.artifact import (
    Artifact,
    Form,
    Tensors,
    form_of,
    opened,
    read_tensor,
    read_tensors,
    write_stream,
    write_tensors,
)

COMMIT_SHARE = 0.05  # of the time, at most, goes into writing sums that are held in memory


def accumulate(
    stage: Artifact,
    units: list[int],
    n_units: int,
    compute: Callable[[int], Tensors],
    hold: bool = False,
) -> Path:
    """The file with the sum of ``compute(unit)`` over all ``n_units``, added in unit order; ``units`` are this rank's.

    The sum lives on the disk: in memory there is one unit's part of it, and one tensor of the sum while the part is added.
    After each unit the sum so far is committed, so a run that stops goes on where it was.  With several ranks each commits
    its own units; the first rank adds up those that are there, in the same order, and so to the same bits, between its own, and
    what is added is removed: about as many parts as ranks lie on the disk at a time.

    Args:
        hold: where units take less time than writing sums, as on an accelerator: a process alone keeps the sum in memory, and
            commits it when that takes a twentieth of the time since the last commit.  The bits are the same.
    """
    first = _newest_sum(stage)
    alone, mine, missing = len(units) == n_units, [u for u in units if u >= first], remaining(stage, units)
    dist.barrier()  # what was there is known to all before the first rank adds and removes it
    with dist.together():
        if alone:
            _sum_alone(stage, mine, compute, first, n_units, hold)
        else:
            for unit in missing:
                stage.commit(unit, compute(unit))
                if 0 in units:
                    _fold_ready(stage, n_units)
    dist.barrier()
    dist.on_first(lambda: _fold_ready(stage, n_units))
    dist.barrier()
    if not sum_path(stage, n_units).exists():
        raise StorageError(f"parts of a sum are missing in {stage.path}; give the same command again")
    return sum_path(stage, n_units)


def _sum_alone(
    stage: Artifact, units: list[int], compute: Callable[[int], Tensors], committed: int, n_units: int, hold: bool
) -> None:
    made = ((unit, stage.read(unit) if stage.has(unit) else compute(unit)) for unit in units)
    if hold and units:
        _sum_in_memory(stage, made, committed, n_units)
    else:
        for unit, part in made:
            _fold(stage, unit, part)


def remaining(stage: Artifact, units: list[int]) -> list[int]:
    """Those of ``units`` that are still to be computed."""
    first = _newest_sum(stage)
    return [u for u in units if u >= first and not stage.has(u)]


def _fold_ready(stage: Artifact, n_units: int) -> None:
    """Add up the units that come next, as far as they are there, one tensor at a time, and remove them."""
    first = ready = _newest_sum(stage)
    while ready < n_units and stage.has(ready):
        ready += 1
    if ready == first:
        return
    files = [sum_path(stage, first)] * (first > 0) + [stage.unit_path(unit) for unit in range(first, ready)]
    _write_sum(sum_path(stage, ready), [_stored(path) for path in files])
    for path in files:
        path.unlink(missing_ok=True)


def _sum_in_memory(stage: Artifact, made: Iterable[tuple[int, Tensors]], committed: int, n_units: int) -> None:
    """Go on from the sum of the first ``committed`` units."""
    total = read_tensors(sum_path(stage, committed)) if committed else {}
    since, cost = time.perf_counter(), 0.0
    for unit, part in made:
        for name in list(part):
            total[name] = part.pop(name) + total[name] if name in total else part.pop(name)
        now = time.perf_counter()
        if unit + 1 == n_units or cost <= COMMIT_SHARE * (now - since):
            write_tensors(sum_path(stage, unit + 1), total)
            if committed:
                sum_path(stage, committed).unlink(missing_ok=True)
            committed, since = unit + 1, time.perf_counter()
            cost = since - now


def sum_path(stage: Artifact, n_units: int) -> Path:
    return stage.path / f"sum-{n_units:06d}.safetensors"


def _newest_sum(stage: Artifact) -> int:
    """How many units the newest sum holds."""
    sums = sorted(stage.path.glob("sum-*.safetensors"))
    for older in sums[:-1]:  # a kill came between writing the next sum and removing this one
        older.unlink(missing_ok=True)
    return int(sums[-1].stem.removeprefix("sum-")) if sums else 0


def _fold(stage: Artifact, unit: int, part: Tensors) -> None:
    """Add a unit's part, whose tensors are let go as they are written."""
    held = {name: (form_of(tensor), partial(part.pop, name)) for name, tensor in part.items()}
    old = sum_path(stage, unit)
    _write_sum(sum_path(stage, unit + 1), [held, _stored(old)] if unit else [held])
    old.unlink(missing_ok=True)


Parts = dict[str, tuple[Form, Callable[[], Tensor]]]  # by the name of a tensor: its form, and how it is had


def _stored(path: Path) -> Parts:
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        forms = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
    return {name: (form, partial(read_tensor, path, name)) for name, form in forms.items()}


def _write_sum(path: Path, added: list[Parts]) -> None:
    """Add up one tensor at a time; a layer may be called in some units only."""

    def total(name: str) -> Tensor:
        first, *others = (parts[name][1] for parts in added if name in parts)
        value = first()
        for other in others:
            value = value + other()
        return value

    write_stream(path, {name: form for parts in added for name, (form, _) in parts.items()}, total)
