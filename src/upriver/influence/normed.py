"""Unit-norm scores: influence over the lengths of both gradients in the metric of the curvature, between -1 and 1.

    I_f(z) / sqrt(self(z) self(f)),    self(x) = grad x^T (G + lambda I)^-1 grad x = sum G_OI^2 / (lam_OI + lambda)

in the eigenbasis of a block curvature; with ``identity`` it is the cosine of the gradients.  Rankings by it do not favour long or
odd sequences.  ``self(z)`` is measured in the pass of the scan, which then costs about as much more as a correction pass does.

SCORES/norms/unit-K    ``self(f)`` of some queries for each damping, ``energies`` ``[D, Q]``

Axes: N sequences, D dampings, Q queries, W = O I numbers of a layer's gradient.
"""

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Damping
from upriver.curvature.blocks import BlockCurvature
from upriver.curvature.consumers import Rotation
from upriver.influence.job import Job
from upriver.influence.queries import query_chunks, token_gradients
from upriver.influence.score import Score
from upriver.model.layers import Layer
from upriver.runtime.artifact import Tensors, read_tensor
from upriver.runtime.units import each
from upriver.tensors import accumulator_dtype
from upriver.text.batch import Batch


class Lengths:
    """Consumer: ``self(z)`` of each sequence of a pass for each damping.

    Args:
        like: gives the device and dtype of what layers saw; sums are in float32 or wider.

    Example:
        >>> consumer = Lengths(factors.curvature(), layers, [Damping()], model.like)
        >>> sweep(model, layers, source, source.rows, consumer)
        >>> consumer.result()["self"]  # [N, D], in the order of the rows
    """

    def __init__(self, curvature: BlockCurvature, layers: list[Layer], dampings: list[Damping], like: Tensor):
        self.dtype, self.count = accumulator_dtype(like.dtype), len(dampings)
        bases, self.weights_WD = {}, {}
        for x in layers:
            block = curvature.block(x.name)
            weights = [block.denominator(damping).reciprocal().flatten() for damping in dampings]
            self.weights_WD[x.name] = torch.stack(weights, 1).to(like.device, self.dtype)
            if block.basis is not None:
                bases[x.name] = block.basis.to(like)
        self._rotate = Rotation(bases or None)
        self.begin_unit()

    def begin_unit(self) -> None:
        """Forget what was measured; the next rows are a unit of their own."""
        self.rows: list[np.ndarray] = []
        self.found_ND: list[Tensor] = []

    def begin(self, batch: Batch) -> None:
        self._rotate.begin()
        self.rows.append(batch.rows_N)
        self.found_ND.append(torch.zeros(len(batch.rows_N), self.count, dtype=self.dtype, device=batch.device))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        for part, G_NOI in self._rotate(layer, a_NTI, g_NTO):
            self.found_ND[-1][part] += G_NOI.to(self.dtype).square().flatten(1) @ self.weights_WD[layer.name]

    def result(self) -> Tensors:
        """``self`` ``[N, D]`` in the order of the rows, on the host."""
        order = torch.from_numpy(np.argsort(np.concatenate(self.rows), kind="stable"))
        return {"self": torch.cat(self.found_ND).cpu()[order]}


class Normed:
    """Consumer: scores and self-influence, side by side in one pass."""

    def __init__(self, score: Score, own: Lengths):
        self.both = (score, own)
        own.begin_unit()

    def begin(self, batch: Batch) -> None:
        for consumer in self.both:
            consumer.begin(batch)

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        for consumer in self.both:
            consumer(layer, a_NTI, g_NTO)

    def result(self) -> Tensors:
        return self.both[0].result() | self.both[1].result()


def query_energies(job: Job) -> np.ndarray:
    """``self(f)`` of the query of each column, float64, exactly: at full rank and in the type of the queries."""
    split = query_chunks(job.layers, job.queries, job.rank, job.division.solve_bytes)
    stage, curvature, like = job.open("norms", bytes=job.division.solve_bytes), job.by_layer, job.model.like
    assert curvature is not None

    def compute(unit: int) -> Tensors:
        total_DQ = torch.zeros(len(job.dampings), len(split[unit]), dtype=torch.float64)
        for layers in job.groups("queries"):
            found = token_gradients(job.model, layers, job.queries, split[unit], job.division.batch_tokens)
            for x in layers:
                block, tokens = curvature.block(x.name).to(like), found.pop(x, split[unit], like)
                total_DQ += torch.stack([block.energies(tokens, damping) for damping in job.dampings]).cpu()
        return {"energies": total_DQ}

    files = each(stage, len(split), compute)
    return torch.cat([read_tensor(path, "energies") for path in files], 1).flatten().numpy()


def unit_norm(scores_NQ: np.ndarray, own_ND: np.ndarray, energy_Q: np.ndarray) -> np.ndarray:
    """Raw scores over both lengths, float32 ``[N, Q]``: columns go through all queries for the first damping, then the next.

    A gradient of zero has no direction: 0.  What rank and rounding leave beyond 1 is cut off.
    """
    each_NQ = np.repeat(own_ND, len(energy_Q) // own_ND.shape[1], 1).astype(np.float64)
    length_NQ = np.sqrt(each_NQ * energy_Q)
    found_NQ = np.divide(scores_NQ, length_NQ, out=np.zeros_like(length_NQ), where=length_NQ > 0)
    return found_NQ.clip(-1, 1).astype(np.float32)
