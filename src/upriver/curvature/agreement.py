"""How far a fit has converged: a few sequences scored on each other by the eigenvalues of either half of the sample.

Axes: N sequences, P pairs of them, L layers, I inputs of a layer (+1 with a bias), O outputs, W = O I.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Damping
from upriver.curvature.blocks import Moments
from upriver.model.layers import Layer
from upriver.runtime.artifact import Tensors, read_tensor
from upriver.runtime.passes import compared
from upriver.tensors import even_parts, rotated_gradients
from upriver.text.batch import Batch


def probes(total: int, fitted: int, at_once: int) -> list[np.ndarray]:
    """Random ones of ``total`` sequences, in batches of about ``at_once``, for a sample of ``fitted``."""
    rows = np.sort(np.random.default_rng(0).permutation(total)[: compared(fitted, at_once)])
    return [rows[at] for at in even_parts(len(rows), at_once) if len(rows[at]) > 1]


def probed(batches: list[np.ndarray], fitted: int, at_once: int) -> list[np.ndarray]:
    """Random ones of the sample's own ``batches``, of which the first ``at_once`` sequences are compared.

    They are batches that the passes have seen, with the same labels where these are the corpus's: a disk may hold them.
    """
    found: list[np.ndarray] = []
    for i in np.random.default_rng(0).permutation(len(batches)):
        if sum(min(len(rows), at_once) for rows in found) >= compared(fitted, at_once):
            break
        found += [batches[i]] * (len(batches[i]) > 1)
    return found


def denominators(sums: Path, group: list[Layer]) -> Tensors:
    """``lam + lambda`` of each half, ``[2, O, I]`` for every layer, from the sums of a correction pass."""
    n_2, found = read_tensor(sums, "sequences"), {}
    for x in group:
        lam_2OI = read_tensor(sums, f"lam:{x.name}") / n_2[:, None, None]
        found[x.name] = lam_2OI.add_(torch.tensor([Damping().of(lam_OI) for lam_OI in lam_2OI])[:, None, None])
    return found


class Agreement:
    """Consumer: the scores of the sequences of a batch on each other, by the eigenvalues of either half of the sample.

    ``pairs_2LP``: for each half and layer the scores of P pairs; every two of a batch's first ``at_once`` sequences are a pair.
    """

    def __init__(self, moments: dict[str, Moments], denominators: dict[str, Tensor], at_once: int):
        self.moments, self.denominators = moments, denominators  # lam + lambda: [2, O, I] of each layer
        self.at_once = at_once
        self.parts: list[Tensor] = []
        self.place = {name: i for i, name in enumerate(moments)}

    def begin(self, batch: Batch) -> None:
        N = min(self.at_once, len(batch.rows_N))
        self.upper = torch.triu_indices(N, N, 1)
        self.parts.append(torch.zeros(2, len(self.place), self.upper.shape[1]))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        m = self.moments[layer.name]
        G_NW = rotated_gradients(a_NTI[: self.at_once], g_NTO[: self.at_once], m.Q_A_II, m.Q_S_OO).flatten(1)
        for half, denominator_OI in enumerate(self.denominators[layer.name]):
            scores_NN = (G_NW / denominator_OI.flatten().to(G_NW)) @ G_NW.T
            self.parts[-1][half, self.place[layer.name]] = scores_NN[self.upper[0], self.upper[1]].float().cpu()

    def result(self) -> Tensor:
        return torch.cat(self.parts, 2)


def agreement(pairs: list[Tensor | None]) -> dict[str, Any]:
    """The correlation between the halves' scores, of the sums over layers and of the worst layer."""
    what = "correlation of the scores of random sequences on each other between the two halves of the sample"
    known = [p for p in pairs if p is not None]
    if len(known) < len(pairs) or known[0].shape[2] < 2:
        return {"mean": None, "worst": None, "what": what}
    pairs_2LP = torch.cat(known, 1).double()
    layers = [_correlation(pairs_2LP[:, i]) for i in range(pairs_2LP.shape[1])]
    numbers = [x for x in layers if x is not None]
    return {"mean": _correlation(pairs_2LP.sum(1)), "worst": min(numbers, default=None), "what": what}


def _correlation(pairs_2P: Tensor) -> float | None:
    value = float(torch.corrcoef(pairs_2P)[0, 1])
    return value if value == value else None  # not a number where all scores of a half are the same
