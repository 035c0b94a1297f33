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
from upriver.model.load import Model
from upriver.model.sweep import Source, sweep
from upriver.runtime.artifact import Tensors, read_tensor
from upriver.runtime.cost import COMPARED
from upriver.tensors import rotated_gradients
from upriver.text.batch import Batch, Sequences

PROBES, SHARE = 64, 16  # sequences that are looked at, and at most one for so many that were fitted on, but 16 at least


class Agreement:
    """Consumer: the scores of the sequences of a batch on each other, by the eigenvalues of either half of the sample.

    Every two of a batch's first ``COMPARED`` sequences are a pair; ``parts`` holds ``[2, L, P]`` of each batch: for each half
    and layer the scores of its pairs.
    """

    def __init__(self, moments: dict[str, Moments], denominators: Tensors):
        self.moments, self.denominators = moments, denominators  # lam + lambda: [2, O, I] of each layer
        self.parts: list[Tensor] = []
        self.place = {name: i for i, name in enumerate(moments)}

    def begin(self, batch: Batch) -> None:
        N = min(COMPARED, len(batch.rows_N))
        self.upper = torch.triu_indices(N, N, 1)
        self.parts.append(torch.zeros(2, len(self.place), self.upper.shape[1]))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        m = self.moments[layer.name]
        G_NW = rotated_gradients(a_NTI[:COMPARED], g_NTO[:COMPARED], m.Q_A_II, m.Q_S_OO).flatten(1)
        for half, denominator_OI in enumerate(self.denominators[layer.name]):
            scores_NN = (G_NW / denominator_OI.flatten().to(G_NW)) @ G_NW.T
            self.parts[-1][half, self.place[layer.name]] = scores_NN[self.upper[0], self.upper[1]].float().cpu()


def compare(
    model: Model, group: list[Layer], data: Sequences, fitted: int, moments: dict[str, Moments], sums: Path
) -> Tensor | None:
    """Scores of a few random sequences on each other in a group of layers, ``[2, L, P]``; None when a half is empty.

    Args:
        fitted: how many sequences the eigenvalues were measured on.
        sums: the file of a correction pass.
    """
    n_2, denominators = read_tensor(sums, "sequences"), {}
    if not int(n_2.min()):
        return None
    for x in group:
        lam_2OI = read_tensor(sums, f"lam:{x.name}") / n_2[:, None, None]
        denominators[x.name] = lam_2OI.add_(torch.tensor([Damping().of(lam) for lam in lam_2OI])[:, None, None])
    count = max(2 * COMPARED, min(PROBES, fitted // SHARE))
    rows = np.random.default_rng(0).permutation(len(data))[:count]
    source = Source.of(data, rows, COMPARED * int(np.max(np.asarray(data.lengths_N)[rows])))
    consumer = Agreement(moments, denominators)
    sweep(model, group, source, rows, consumer)
    return torch.cat(consumer.parts, 2)


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
