"""EK-FAC at several dampings at once: the best combination of its solutions, by the exact Gauss-Newton matrix.

A block curvature leaves out what couples layers, which makes its solutions too long, in some directions more than in others.
Solutions ``b_k`` at several dampings cost nothing, and tell such directions apart.  Among all ``v = sum_k c_k b_k`` the energy
``q.v - 1/2 v.(G + lambda)v`` is largest at ``(B^T (G + lambda) B) c = B^T q`` (Galerkin): a matrix of ``K`` rows for each query,
by forward mode alone, and with so few unknowns few tokens are enough.
Axes: Q queries, K parts, P tracked parameters, M outputs of a batch, C their width.
"""

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from upriver.curvature.base import Curvature, Damping, Grads, Solution
from upriver.curvature.blocks import BlockCurvature
from upriver.curvature.products import ROOM, Tracked
from upriver.errors import ConfigError
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.runtime.progress import show_bytes
from upriver.text.batch import Sequences

TIMES = (0.1, 1.0, 10.0)  # the damping, of the parts; two more, at .01 and 100, bring nothing more
RIDGE = 1e-6  # of the scaled matrix, whose diagonal is one: where parts are nearly the same


class Combined(Curvature):
    """The solutions of a block curvature at the dampings ``TIMES`` that of the query, combined anew for each query.

    Args:
        rows: the sequences whose mean Gauss-Newton matrix the energy is taken with.
        memory_bytes: for what parts hold while they go through a batch side by side; None: 1 GiB.

    Raises:
        ConfigError: (by ``solve``) the memory is too small for the outputs of one batch, once for each part.

    Example:
        >>> Combined(model, layers, corpus, corpus.sample(4_000, 0), factors.curvature()).solve(q, Damping())
    """

    def __init__(
        self,
        model: Model,
        layers: list[Layer],
        data: Sequences,
        rows: np.ndarray,
        start: BlockCurvature,
        *,
        batch_tokens: int = 1024,
        memory_bytes: int | None = None,
    ):
        self.function, self.data, self.rows, self.start = Tracked(model, layers), data, rows, start
        self.batch_tokens, self.memory_bytes = batch_tokens, memory_bytes or ROOM

    def lambdas(self, damping: Damping) -> dict[str, float]:
        return self.start.lambdas(damping)

    def matvec(self, q: Grads, damping: Damping) -> Grads:
        """``(G + lambda I) q`` with the ``G`` of the block curvature."""
        return self.start.matvec(q, damping)

    def solve(self, q: Grads, damping: Damping) -> Solution:
        space = self.function.space
        several = [damping._replace(value=x * damping.value) for x in TIMES if x * damping.value > 0] or [damping]
        b_QKP = torch.stack([space.flatten(self.start.solve(q, x).value) for x in several], 1)
        q_QP = space.flatten(q)
        lambda_P = space.spread(self.lambdas(damping), q_QP).double()
        v_QP = torch.empty_like(q_QP)
        for i, b_KP in enumerate(b_QKP):
            precise_KP = b_KP.double()
            A_KK = self._between(b_KP) + ((precise_KP * lambda_P) @ precise_KP.T).cpu()
            c_K = _solved(A_KK, (precise_KP @ q_QP[i].double()).cpu())
            v_QP[i] = (c_K.to(precise_KP) @ precise_KP).to(v_QP)
        return Solution(space.unflatten(v_QP), True, {"products": float(b_QKP.shape[0] * b_QKP.shape[1])})

    def _between(self, b_KP: Tensor) -> Tensor:
        """``B^T G B``, float64 ``[K, K]``, on the host."""
        function, total_KK = self.function, torch.zeros(len(b_KP), len(b_KP), dtype=torch.float64)
        with function.differentiable(), torch.no_grad():
            for batch in function.linear(self.data, self.rows, self.batch_tokens, self.memory_bytes):
                if (taken := 2 * len(b_KP) * batch.outputs_MC.nbytes) > self.memory_bytes:
                    raise ConfigError(
                        f"the memory is too small to combine {len(b_KP)} solutions of a question: got "
                        f"{show_bytes(self.memory_bytes)} for them, they take {show_bytes(taken)}; "
                        "give more with --memory, or leave out --combine"
                    )
                b_like_KP = b_KP.to(function.model.like)
                Jb_KMC = torch.cat([vmap(batch.along)(few) for few in b_like_KP.split(batch.width)])
                HJb_KMC = torch.cat([vmap(batch.curved)(few) for few in Jb_KMC.split(batch.width)])
                total_KK += (HJb_KMC.flatten(1) @ Jb_KMC.flatten(1).T).double().cpu()
        return total_KK / len(self.rows)


def _solved(A_KK: Tensor, b_K: Tensor) -> Tensor:
    """``A c = b`` with the diagonal scaled to one; a part that is zero gets zero."""
    scale_K = A_KK.diagonal().sqrt()
    inverse_K = torch.where(scale_K > 0, 1 / scale_K, 0.0)
    scaled_KK = A_KK * torch.outer(inverse_K, inverse_K) + torch.diag(RIDGE + (scale_K == 0).double())
    return torch.linalg.solve(scaled_KK, b_K * inverse_K) * inverse_K
