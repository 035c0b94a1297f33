"""The oracle: every quantity of the method once more, by ``torch.func`` and loops that are written out.

One sequence at a time, without padding.  It shares no code with capture, curvature, influence or tensors: gradients come from
``functional_call``, layer inputs and output gradients from a copy of the model whose layers add an offset that is differentiated.
A layer is its name; its weight is ``[O, I]``, a bias the last column.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Callable], Tensor]  # (the model as a function) -> the loss of one sequence
Layers = dict[str, Tensor]  # layer name -> tensor


def token_loss(tokens_T: Tensor, labels_T: Tensor) -> Loss:
    """``- sum_t log p(label_t | z_<=t)`` over the positions whose label is not negative."""

    labels = labels_T.tolist()

    def loss(call: Callable) -> Tensor:
        logits_TV = call(input_ids=tokens_T[None], use_cache=False).logits[0]
        total = logits_TV.new_zeros(())
        for t, label in enumerate(labels):
            if label >= 0:
                total = total - (logits_TV[t, label] - torch.logsumexp(logits_TV[t], 0))
        return total

    return loss


def class_loss(x_I: Tensor, label: Tensor | int) -> Loss:
    place = int(label)

    def loss(call: Callable) -> Tensor:
        logits_C = call(x_I[None])[0]
        return torch.logsumexp(logits_C, 0) - logits_C[place]

    return loss


def squared_loss(x_I: Tensor, y_K: Tensor) -> Loss:
    return lambda call: ((call(x_I[None])[0] - y_K) ** 2).sum() / 2


def gradient(module: nn.Module, names: list[str], loss: Loss) -> Layers:
    """The loss's gradient to each layer's weight, ``[O, I]``; a weight that several modules share is one weight."""
    weights = {f"{n}.{p}": w.detach() for n in names for p, w in module.get_submodule(n).named_parameters()}
    grads = grad(lambda w: loss(lambda *a, **k: functional_call(module, w, a, k)))(weights)
    out = {}
    for n in names:
        grads = {name: g.detach() for name, g in grads.items()}
        weight = grads[f"{n}.weight"]
        weight = weight.T if _transposed(module.get_submodule(n)) else weight
        out[n] = torch.cat([weight, grads[f"{n}.bias"][:, None]], 1) if f"{n}.bias" in grads else weight
    return out


def jacobian(module: nn.Module, names: list[str], outputs: Loss) -> Layers:
    """The slopes of ``outputs`` ``[M, C]`` in each layer's weight, ``[M, C, O, I]``."""
    weights = {f"{n}.{p}": w.detach() for n in names for p, w in module.get_submodule(n).named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel cannot be batched over the rows of the Jacobian
        slopes = jacrev(lambda w: outputs(lambda *a, **k: functional_call(module, w, a, k)))(weights)
    out = {}
    for n in names:
        weight = slopes[f"{n}.weight"].detach()
        weight = weight.mT if _transposed(module.get_submodule(n)) else weight
        out[n] = torch.cat([weight, slopes[f"{n}.bias"].detach()[..., None]], 3) if f"{n}.bias" in slopes else weight
    return out


class Pair(NamedTuple):
    """A layer's inputs and output gradients for one sequence, a row for each call and position."""

    a_CTI: Tensor
    g_CTO: Tensor


class _Offset(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen, self.offsets = inner, [], None

    def forward(self, x: Tensor) -> Tensor:
        call = len(self.seen)
        self.seen.append(x.detach())
        out = self.inner(x)
        return out if self.offsets is None else out + self.offsets[call].reshape(out.shape)


def pairs(module: nn.Module, names: list[str], loss: Loss) -> dict[str, Pair]:
    """``a`` (a one appended when there is a bias) and ``g`` of every call of every layer, ``[calls, T, .]``."""
    module = copy.deepcopy(module).requires_grad_(False)
    spies: dict[str, list[_Offset]] = {}
    for n in names:
        target = module.get_submodule(n)
        users = [name for name, m in module.named_modules() if getattr(m, "weight", None) is target.weight]
        spies[n] = [_Offset(module.get_submodule(user)) for user in users]
        for user, spy in zip(users, spies[n], strict=True):
            module.set_submodule(user, spy)
    loss(module)
    zeros = {n: [[_like_output(spy, x) for x in spy.seen] for spy in spies[n]] for n in names}
    inputs = {n: [_with_one(spy.inner, _rows(x)) for spy in spies[n] for x in spy.seen] for n in names}

    def shifted(offsets: dict[str, list[list[Tensor]]]) -> Tensor:
        for n in names:
            for spy, offset in zip(spies[n], offsets[n], strict=True):
                spy.seen, spy.offsets = [], offset
        return loss(module)

    slopes = grad(shifted)(zeros)
    return {n: Pair(torch.stack(inputs[n]), torch.stack([g for s in slopes[n] for g in s])) for n in names}


def _like_output(spy: _Offset, x: Tensor) -> Tensor:
    return torch.zeros_like(_rows(spy.inner(x)).detach())


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _with_one(layer: nn.Module, x_TI: Tensor) -> Tensor:
    return torch.cat([x_TI, torch.ones(len(x_TI), 1, dtype=x_TI.dtype)], 1) if layer.bias is not None else x_TI


def _transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"


class Moments(NamedTuple):
    A: Layers
    S: Layers
    T_mean: dict[str, float]


def moments(each: list[dict[str, Pair]]) -> Moments:
    """``A``, ``S``: means over all calls and positions of all sequences (eq. 16); ``T_mean``: how many in a sequence."""
    A, S, T_mean = {}, {}, {}
    for n in each[0]:
        a = [x for pair in each for call in pair[n].a_CTI for x in call]
        g = [x for pair in each for call in pair[n].g_CTO for x in call]
        A[n] = sum(torch.outer(x, x) for x in a) / len(a)
        S[n] = sum(torch.outer(x, x) for x in g) / len(g)
        T_mean[n] = len(a) / len(each)
    return Moments(A, S, T_mean)


def token_gradients(pair: Pair) -> Tensor:
    """The part of the weight's gradient that each position carries, ``[T, O, I]``; calls are added."""
    C, T = pair.a_CTI.shape[:2]
    return torch.stack([sum(torch.outer(pair.g_CTO[c, t], pair.a_CTI[c, t]) for c in range(C)) for t in range(T)])


def token_scores(v: Layers, each: dict[str, Pair]) -> Tensor:
    """``- sum over layers of g_t^T v a_t`` (eq. 31), ``[T]``."""
    return -sum((token_gradients(each[n]) * v[n]).sum((1, 2)) for n in v)


def eigenvalues(grads: list[Tensor], Q_S: Tensor, Q_A: Tensor) -> Tensor:
    """The mean square of each sequence's gradient in the eigenbasis (eq. 20), ``[O, I]``."""
    return sum((Q_S.T @ G @ Q_A) ** 2 for G in grads) / len(grads)


class Basis(NamedTuple):
    """``G = (Q_S x Q_A) diag(lam) (Q_S x Q_A)^T`` of one layer."""

    lam: Tensor
    Q_S: Tensor
    Q_A: Tensor

    def dense(self) -> Tensor:
        """``[O I, O I]``, for gradients laid flat row by row."""
        Q = torch.kron(self.Q_S, self.Q_A)
        return Q @ torch.diag(self.lam.flatten()) @ Q.T

    def solve(self, q_OI: Tensor, damping: float) -> Tensor:
        """``(G + lambda I)^-1 q`` by a dense solve."""
        G = self.dense()
        return torch.linalg.solve(G + damping * torch.eye(len(G), dtype=G.dtype), q_OI.flatten()).reshape(q_OI.shape)


def curvature(kind: str, A: Tensor, S: Tensor, T_mean: float, grads: list[Tensor]) -> Basis:
    """``ekfac``, ``kfac``, ``diagonal`` or ``identity`` from the moments and each sequence's sampled-label gradient."""
    (eig_S, Q_S), (eig_A, Q_A) = torch.linalg.eigh(S), torch.linalg.eigh(A)
    if kind == "ekfac":
        return Basis(eigenvalues(grads, Q_S, Q_A), Q_S, Q_A)
    if kind == "kfac":
        return Basis(T_mean * torch.outer(eig_S, eig_A), Q_S, Q_A)
    Q_S, Q_A = torch.eye(len(S), dtype=S.dtype), torch.eye(len(A), dtype=A.dtype)
    lam = eigenvalues(grads, Q_S, Q_A) if kind == "diagonal" else torch.ones_like(grads[0])
    return Basis(lam, Q_S, Q_A)


def score(v: Layers, G: Layers) -> Tensor:
    """``I_f = - sum over layers of <v, grad L>`` (eq. 25, 30)."""
    return -sum((v[n] * G[n]).sum() for n in v)


def softmax_fisher(logits_C: Tensor) -> Tensor:
    """The Hessian of cross-entropy in the logits: the exact expectation of the label's outer product."""
    p = F.softmax(logits_C, 0)
    return torch.diag(p) - torch.outer(p, p)
