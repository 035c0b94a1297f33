"""Products with the Gauss-Newton matrix and the Hessian of the mean sequence loss, without forming either.

Axes: P tracked parameters (every layer's ``W_OI`` laid flat, one after the other), Q vectors, M outputs of a batch, C their
width, K random vectors.
The solvers of this room work on flat vectors ``v_QP``; :class:`Space` goes to and from ``Grads``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from upriver.curvature.base import Grads
from upriver.errors import ModelError
from upriver.model.capture import frozen
from upriver.model.layers import Layer, weight_gradient_as_stored, weight_OI
from upriver.model.model import Model
from upriver.model.packed import any_packed, held_in
from upriver.model.parts import Part
from upriver.text.batch import Batch, Sequences

Kind = Literal["gauss-newton", "hessian"]
MOST = 64  # vectors that go through a batch side by side
ROOM = 1 << 30  # bytes for them where no memory is given
DIAGONAL = 512  # parameters up to which the diagonal of the matrix is formed exactly
PROBES = 16  # random vectors for an estimate of it


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

    def means(self, x_P: Tensor) -> dict[str, float]:
        """The mean of each layer's part."""
        return {name: float(part.double().mean()) for name, part in self.unflatten(x_P[None]).items()}


class Replaced(nn.Module):
    """A module called with some of its weights replaced."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]):
        super().__init__()
        self.module, self._weights = module, weights

    def forward(self, *args, **kwargs):
        return functional_call(self.module, self._weights, args, kwargs)


class Linear(NamedTuple):
    """The outputs of a batch as a linear map of the weights, near the weights as they are."""

    rows: np.ndarray
    outputs_MC: Tensor
    along: Callable[[Tensor], Tensor]  # v_P -> J v
    curved: Callable[[Tensor], Tensor]  # x_MC -> H x, as Tracked.curved
    width: int  # vectors that may go through it side by side


class Tracked:
    """A model as a function of its tracked weights ``theta_P``."""

    def __init__(self, model: Model, layers: list[Layer]):
        self.model, self.layers, self.space = model, layers, Space.of(layers)
        held = held_in(x.modules[0] for x in layers)
        if held or any_packed(model.module):
            raise ModelError(
                f"no derivative along a direction of packed weights: {held or 'other layers of the model are packed'}, of which "
                "ekfac, kfac, diagonal and identity ask no more; choose one of them with --curvature, without --refine"
            )
        names = {id(m): name for name, m in model.module.named_modules()}
        held = {x.name: x.modules[0] for x in layers}
        self._prefix = {n: names[id(m.owner if isinstance(m, Part) else m)] for n, m in held.items()}

    @property
    def theta_P(self) -> Tensor:
        """The weights as they are."""
        return torch.cat([weight_OI(x.modules[0]).flatten() for x in self.layers])

    def at(self, theta_P: Tensor) -> nn.Module:
        """The module with ``theta_P`` for its tracked weights."""
        weights, stored, experts = self.space.unflatten(theta_P[None]), {}, {}
        for x in self.layers:
            m, parts = x.modules[0], weight_gradient_as_stored(x.modules[0], weights[x.name][0])
            if isinstance(m, Part):
                for part, value in parts.items():
                    whole = experts.setdefault(f"{self._prefix[x.name]}.{part}", (m, m.pieces(m.stored[part])))
                    whole[1][m.number] = value
                continue
            stored |= {f"{self._prefix[x.name]}.{part}": value for part, value in parts.items()}
        return Replaced(self.model.module, stored | {name: m.joined(each) for name, (m, each) in experts.items()})

    def outputs(self, theta_P: Tensor, batch: Batch) -> Tensor:
        return self.model.task.outputs(self.at(theta_P), batch)

    def loss_of(self, outputs_MC: Tensor, batch: Batch) -> Tensor:
        return self.model.task.loss_of(outputs_MC, batch)

    def loss(self, theta_P: Tensor, batch: Batch) -> Tensor:
        return self.loss_of(self.outputs(theta_P, batch), batch)

    def gradient(self, theta_P: Tensor, batch: Batch) -> Tensor:
        """The gradient of the batch's summed loss, ``[P]``."""
        return grad(lambda theta: self.loss(theta, batch))(theta_P)

    def curved(self, outputs_MC: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
        """``x_MC -> H x``, with ``H`` the Hessian of the loss of the outputs: for softmax the covariance under ``p``."""
        slope = grad(lambda h: self.loss_of(h, batch))
        return lambda x_MC: jvp(slope, (outputs_MC,), (x_MC,))[1]

    def linear(
        self, data: Sequences, rows: np.ndarray, batch_tokens: int, memory_bytes: int | None
    ) -> Iterator[Linear]:
        """The sequences ``rows`` batch by batch, for forward mode; to be used inside of :meth:`differentiable`."""
        theta_P, width = self.theta_P, 0
        for part in data.plan(batch_tokens, rows):
            batch = data.batch(part).to(theta_P.device)
            width = width or self.side_by_side(theta_P, batch, memory_bytes)  # the first is the largest

            def outputs(theta_P: Tensor, batch: Batch = batch) -> Tensor:
                return self.outputs(theta_P, batch)

            def along(v_P: Tensor, outputs: Callable[[Tensor], Tensor] = outputs) -> Tensor:
                return jvp(outputs, (theta_P,), (v_P,))[1]

            outputs_MC = outputs(theta_P)
            yield Linear(part, outputs_MC, along, self.curved(outputs_MC, batch), width)

    def side_by_side(self, theta_P: Tensor, batch: Batch, memory_bytes: int | None) -> int:
        """How many vectors may go through a batch at once.

        A vector holds itself, its image and two copies on the way, some six tensors as large as the outputs, and at most once
        more what a plain backward pass keeps of the batch.
        """
        kept: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            outputs_MC = self.outputs(theta_P.detach().clone().requires_grad_(), batch)
        each = 4 * theta_P.nbytes + 6 * outputs_MC.nbytes + sum(kept.values())
        return min(MOST, max(1, (memory_bytes or ROOM) // each))

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Frozen, in evaluation mode, attention by plain algebra: fused kernels have no forward mode or second derivative."""
        with frozen(self.model.module), sdpa_kernel(SDPBackend.MATH):
            yield


class Products:
    """``v_QP -> G v`` (or ``H v``), averaged over the sequences ``rows`` of ``data``, computed in the dtype of the model.

    ``G = mean over sequences of sum_m J_m^T H_m J_m`` with ``H_m`` the Hessian of the loss of output ``m``: for softmax
    cross-entropy and squared error that is the exact expectation over labels, so nothing is sampled (eq. 10, 11).
    A vector costs about four thirds of a plain training step over the same tokens.

    Args:
        rows: None takes all sequences.
        memory_bytes: for what the vectors hold while they go through a batch side by side; None: 1 GiB.
        advance: told the tokens of each batch when all vectors have been through it.

    Attributes:
        done: vectors multiplied so far; over some of the rows, that share of one.

    Example:
        >>> Products(model, layers, corpus)(v_QP)
    """

    def __init__(
        self,
        model: Model,
        layers: list[Layer],
        data: Sequences,
        rows: np.ndarray | None = None,
        *,
        kind: Kind = "gauss-newton",
        batch_tokens: int = 4096,
        memory_bytes: int | None = None,
        advance: Callable[[int], None] = lambda tokens: None,
    ):
        self.function, self.data, self.kind, self.batch_tokens = Tracked(model, layers), data, kind, batch_tokens
        self.rows = np.arange(len(data)) if rows is None else np.asarray(rows, np.int64)
        self.space, self.theta_P = self.function.space, self.function.theta_P
        self.memory_bytes, self.advance, self.done = memory_bytes, advance, 0.0

    def __call__(self, v_QP: Tensor, some: np.ndarray | None = None) -> Tensor:
        """The product, over all of ``rows`` or over the sequences ``some`` only, in the dtype of ``v_QP``."""
        multiply = self._gauss_newton if self.kind == "gauss-newton" else self._hessian
        rows = self.rows if some is None else some
        v, total_QP = v_QP.to(self.theta_P), torch.zeros_like(v_QP)
        with self.function.differentiable():
            for part in self.data.plan(self.batch_tokens, rows):
                each = multiply(self.data.batch(part).to(v.device))
                for few in torch.arange(len(v)).split(self._width):
                    total_QP[few] += vmap(each)(v[few]).to(total_QP)
                self.advance(int(self.data.lengths_N[part].sum()))
        self.done += len(v) * len(rows) / len(self.rows)
        return total_QP.div_(len(rows))

    @cached_property
    def mean_eigenvalues(self) -> dict[str, float]:
        """The mean eigenvalue of each layer's block, which a relative damping is a multiple of.

        It is the mean of the diagonal: formed exactly up to 512 parameters, above that Hutchinson's estimate from 16 vectors
        of random signs, always the same ones.
        """
        return self.space.means(diagonal(self, self.space.P, self.theta_P))

    @cached_property
    def _width(self) -> int:
        largest = self.data.plan(self.batch_tokens, self.rows)[0]
        return self.function.side_by_side(
            self.theta_P, self.data.batch(largest).to(self.theta_P.device), self.memory_bytes
        )

    def _gauss_newton(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        def outputs(theta_P: Tensor) -> Tensor:
            return self.function.outputs(theta_P, batch)

        h_MC, pull, *_ = vjp(outputs, self.theta_P)
        curved = self.function.curved(h_MC, batch)
        return lambda v_P: pull(curved(jvp(outputs, (self.theta_P,), (v_P,))[1]))[0]

    def _hessian(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda v_P: jvp(lambda theta: self.function.gradient(theta, batch), (self.theta_P,), (v_P,))[1]


def diagonal(A: Callable[[Tensor], Tensor], P: int, like: Tensor) -> Tensor:
    """The diagonal of a symmetric matrix given by its products, ``[P]``: exact for a small one, else an unbiased estimate."""
    if P <= DIAGONAL:
        return A(torch.eye(P, dtype=like.dtype, device=like.device)).diagonal()
    generator = torch.Generator().manual_seed(0)
    z_KP = (torch.randint(2, (PROBES, P), generator=generator) * 2 - 1).to(like)
    return (z_KP * A(z_KP)).mean(0)
