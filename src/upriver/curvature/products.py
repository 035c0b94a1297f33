"""Products with the Gauss-Newton matrix and the Hessian of the mean sequence loss, without forming either.

Axes: P tracked parameters (every layer's ``W_OI`` laid flat, one after the other), Q vectors, M outputs of a batch, C their
width.
The solvers of this room work on flat vectors ``v_QP``; :class:`Space` goes to and from ``Grads``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from upriver.curvature.base import Grads
from upriver.model.capture import frozen
from upriver.model.layers import Layer, weight_gradient_as_stored
from upriver.model.load import Model
from upriver.text.batch import Batch, Sequences

Kind = Literal["gauss-newton", "hessian"]
CHUNK = 64  # vectors that go through a batch side by side


class Space(NamedTuple):
    """The tracked weights as one flat vector: each layer's name and shape, in order."""

    shapes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, layers: list[Layer]) -> "Space":
        return cls({x.name: (x.O, x.I) for x in layers})

    @property
    def sizes(self) -> list[int]:
        return [O * I for O, I in self.shapes.values()]

    @property
    def P(self) -> int:
        return sum(self.sizes)

    def flatten(self, grads: Grads) -> Tensor:
        return torch.cat([grads[name].detach().flatten(1) for name in self.shapes], 1)

    def unflatten(self, v_QP: Tensor) -> Grads:
        parts = zip(self.shapes.items(), v_QP.split(self.sizes, 1), strict=True)
        return {name: part.unflatten(1, shape) for (name, shape), part in parts}

    def spread(self, values: Mapping[str, float], like: Tensor) -> Tensor:
        """One number a layer as a vector ``[P]``."""
        return torch.cat([like.new_full((n,), values[name]) for name, n in zip(self.shapes, self.sizes, strict=True)])


class Replaced(nn.Module):
    """A module called with some of its weights replaced."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]):
        super().__init__()
        self.module, self._weights = module, weights

    def forward(self, *args, **kwargs):
        return functional_call(self.module, self._weights, args, kwargs)


class Tracked:
    """A model as a function of its tracked weights ``theta_P``."""

    def __init__(self, model: Model, layers: list[Layer]):
        self.model, self.layers, self.space = model, layers, Space.of(layers)
        names = {id(m): name for name, m in model.module.named_modules()}
        self._prefix = {x.name: names[id(x.modules[0])] for x in layers}

    @property
    def theta_P(self) -> Tensor:
        """The weights as they are."""
        return torch.cat([_weight(x).flatten() for x in self.layers])

    def at(self, theta_P: Tensor) -> nn.Module:
        """The module with ``theta_P`` for its tracked weights."""
        weights, stored = self.space.unflatten(theta_P[None]), {}
        for x in self.layers:
            parts = weight_gradient_as_stored(x.modules[0], weights[x.name][0])
            stored |= {f"{self._prefix[x.name]}.{part}": value for part, value in parts.items()}
        return Replaced(self.model.module, stored)

    def outputs(self, theta_P: Tensor, batch: Batch) -> Tensor:
        return self.model.task.outputs(self.at(theta_P), batch)

    def loss_of(self, outputs_MC: Tensor, batch: Batch) -> Tensor:
        return self.model.task.loss_of(outputs_MC, batch)

    def loss(self, theta_P: Tensor, batch: Batch) -> Tensor:
        return self.loss_of(self.outputs(theta_P, batch), batch)

    def gradient(self, theta_P: Tensor, batch: Batch) -> Tensor:
        """The gradient of the batch's summed loss, ``[P]``."""
        return grad(lambda theta: self.loss(theta, batch))(theta_P)

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Frozen, in evaluation mode, attention by plain algebra: fused kernels have no forward mode or second derivative."""
        with frozen(self.model.module), sdpa_kernel(SDPBackend.MATH):
            yield


class Products:
    """``v_QP -> G v`` (or ``H v``), averaged over the sequences of ``data``, in the dtype of the model.

    ``G = mean over sequences of sum_m J_m^T H_m J_m`` with ``H_m`` the Hessian of the loss of output ``m``: for softmax
    cross-entropy and squared error that is the exact expectation over labels, so nothing is sampled (eq. 10, 11).

    Example:
        >>> Products(model, layers, corpus)(v_QP)
    """

    def __init__(
        self, model: Model, layers: list[Layer], data: Sequences, kind: Kind = "gauss-newton", batch_tokens: int = 4096
    ):
        self.function, self.data, self.kind, self.batch_tokens = Tracked(model, layers), data, kind, batch_tokens
        self.space = self.function.space
        self._theta_P = self.function.theta_P

    @property
    def device(self) -> torch.device:
        return self._theta_P.device

    def __call__(self, v_QP: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """The product, over all sequences or those of ``rows`` only, in the dtype of ``v_QP``."""
        multiply = self._gauss_newton if self.kind == "gauss-newton" else self._hessian
        v, total = v_QP.to(self._theta_P), torch.zeros_like(v_QP)
        with self.function.differentiable():
            for part in self.data.plan(self.batch_tokens, rows):
                each = multiply(self.data.batch(part).to(v.device))
                total += vmap(each, chunk_size=CHUNK)(v).to(total)
        return total / (len(self.data) if rows is None else len(rows))

    def _gauss_newton(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        def outputs(theta_P: Tensor) -> Tensor:
            return self.function.outputs(theta_P, batch)

        h_MC, pull, *_ = vjp(outputs, self._theta_P)
        slope = grad(lambda h: self.function.loss_of(h, batch))

        def product(v_P: Tensor) -> Tensor:
            Jv_MC = jvp(outputs, (self._theta_P,), (v_P,))[1]
            return pull(jvp(slope, (h_MC,), (Jv_MC,))[1])[0]

        return product

    def _hessian(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda v_P: jvp(lambda theta: self.function.gradient(theta, batch), (self._theta_P,), (v_P,))[1]


def _weight(layer: Layer) -> Tensor:
    """``W_OI``, with the bias as its last column."""
    module = layer.modules[0]
    weight = module.get_parameter("weight").detach()
    weight_OI = weight.T if isinstance(module, Conv1D) else weight
    return torch.cat([weight_OI, module.get_parameter("bias").detach()[:, None]], 1) if layer.bias else weight_OI
