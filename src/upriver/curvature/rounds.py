"""How much of a sample a fit takes, all of it, or twice as much again and again until its halves agree (``until``); and with
which labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from upriver.model.sweep import Labels
from upriver.runtime import dist
from upriver.runtime.artifact import read_json, read_tensor
from upriver.runtime.config import FitOptions
from upriver.text.batch import Sequences


def doublings(tokens: int, first: int) -> list[int]:
    """The sizes of a sample that begins with ``first`` tokens and doubles up to ``tokens``."""
    sizes = [first]
    while sizes[-1] < tokens:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], tokens]


def labels_of(opts: FitOptions, stream: int, outputs: int | None) -> list[Labels]:
    """With which labels each batch goes through a pass; further draws have streams of their own, those of two passes apart."""
    if opts.fisher == "sampled":
        return [Labels(opts.seed, stream + 2 * k) for k in range(opts.draws)]
    return [Labels(output=k, outputs=outputs) for k in range(outputs or 1)]


def rounds(folder: Path, units: list[np.ndarray], data: Sequences, opts: FitOptions) -> Iterator[int]:
    """How many units the sample has in each round, from the round that an earlier run in ``folder`` had come to."""
    counts = [len(units)]
    if opts.until is not None:
        ends_U = np.cumsum([data.lengths_N[rows].sum(dtype=np.int64) for rows in units])
        sizes = doublings(int(ends_U[-1]), opts.unit_tokens)
        counts = sorted({int(np.searchsorted(ends_U, size, side="right")) or 1 for size in sizes} | set(counts))
    begun = 0
    for path in (folder / "covariance").glob("layers-*/sum-*-of-*"):
        rank, _, world = path.stem.removeprefix("sum-").partition("-of-")
        begun = max(begun, (int(read_tensor(path, "units")) - 1) * int(world) + int(rank) + 1)
    if (eigen := folder / "eigen" / "key.json").exists():
        begun = max(begun, read_json(eigen).get("units", 0))
    dist.barrier()  # all have read it before one goes on
    yield from (count for count in counts if count >= min(begun, counts[-1]))


def convergence(halves: dict[str, Any], tokens: int | None) -> str:
    """How well the halves of the sample agree, and after how many tokens where that was looked for."""
    known = (halves["mean"], halves["worst"])
    mean, worst = ("not known (too few sequences)" if x is None else f"{x:.3f}" for x in known)
    after = f" (after {tokens:,} tokens)" if tokens else ""
    return f"convergence: {halves['what']}: {mean}, worst layer {worst}{after}"
