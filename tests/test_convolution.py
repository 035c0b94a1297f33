"""Convolutions are layers like any other: patches for inputs, positions of the output for tokens.

Axes: N images, T positions, C channels, I numbers of a patch (+1 with a bias), O output channels, P tracked weights.
"""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

import upriver as up
from cases import close
from upriver.curvature.base import Damping
from upriver.curvature.blocks import Eigenblock
from upriver.curvature.products import Products
from upriver.errors import ModelError
from upriver.model.coverage import coverage
from upriver.model.layers import find_layers, rows_seen, weight_OI
from upriver.model.parts import unfolded
from upriver.model.shape import model_shape
from upriver.tensors import sequence_gradients

N, CLASSES = 6, 3
HOW = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)},
    "dilated": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": 1, "bias": False},
    "same": {"kernel_size": (1, 3), "dilation": (1, 2), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "reflect"},
}


@cache
def made(how: str, groups: int = 1) -> tuple[up.Model, up.Examples]:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, **HOW[how], groups=groups)
    net = nn.Sequential(first, nn.Tanh(), nn.Conv2d(4, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))
    x = torch.randn(N, 2, 6, 7, dtype=torch.float64)
    net = net.double()
    net(x)
    net.requires_grad_(False)
    return up.Model(net.eval(), task=up.Classification()), up.Examples({"x": x, "y": torch.arange(N) % CLASSES})


def by_autograd(model: up.Model, data: up.Examples, name: str) -> Tensor:
    """Each image's gradient of the loss as a matrix ``[N, O, I]``, by ``torch.func``."""
    weights = {n: p.detach() for n, p in model.module.named_parameters() if n.startswith(f"{name}.")}

    def loss(w, x, y):
        return nn.functional.cross_entropy(functional_call(model.module, w, x[None]), y[None])

    found = vmap(grad(loss), (None, 0, 0))(weights, data.inputs["x"], data.inputs["y"])
    matrix = found[f"{name}.weight"].flatten(2)
    return torch.cat([matrix, found[f"{name}.bias"][..., None]], 2) if f"{name}.bias" in found else matrix


class Gradients:
    def __init__(self):
        self.found, self.parts = {}, {}

    def begin(self, batch):
        self.rows = batch.rows_N

    def __call__(self, layer, a_NTI, g_NTO):
        self.found[layer.name], self.parts[layer.name] = sequence_gradients(a_NTI, g_NTO), (a_NTI, g_NTO)


def captured(model: up.Model, data: up.Examples) -> Gradients:
    source, consumer = up.Source.of(data, np.arange(N), N), Gradients()
    up.sweep(model, up.tracked_layers(model, data, "*"), source, source.rows, consumer)
    assert consumer.rows.tolist() == list(range(N))
    return consumer


@pytest.mark.parametrize("how", HOW)
def test_gradients_are_those_of_autograd(how):
    model, data = made(how)
    found = captured(model, data).found
    assert list(found) == ["5", "2", "0"]
    for name, G_NOI in found.items():
        close(G_NOI, by_autograd(model, data, name), 1e-10)


def patches(conv: nn.Conv2d, x_NCHW: Tensor) -> Tensor:
    """Each output position's patch by going through rows and columns, ``[N, T, I]``; for zero padding given as numbers."""
    (top, left), (kh, kw), (sh, sw), (dh, dw) = conv.padding, conv.kernel_size, conv.stride, conv.dilation
    x = nn.functional.pad(x_NCHW, (left, left, top, top))
    H, W = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    at = [(i * sh, j * sw) for i, j in product(range(H), range(W))]
    found = [x[:, :, i : i + dh * kh : dh, j : j + dw * kw : dw].flatten(1) for i, j in at]
    rows = torch.stack(found, 1)
    return rows if conv.bias is None else torch.cat([rows, torch.ones_like(rows[..., :1])], 2)


@pytest.mark.parametrize("how", ["plain", "strided", "dilated"])
def test_the_fit_is_the_expectation_over_labels_of_written_out_patches(how, tmp_path):
    model, data = made(how)
    conv, x, y = model.module.get_submodule("0"), data.inputs["x"], data.inputs["y"]
    factors = up.fit(model, data, tmp_path, layers="0,2", dtype="float64", fisher="exact", batch_tokens=4)
    a_NTI = patches(conv, x)
    p_NC = model.module(x).softmax(1).detach()
    out_NOT = conv(x).detach().flatten(2)
    A, S, grads = torch.einsum("nti,ntj->ij", a_NTI, a_NTI) / a_NTI[..., 0].numel(), 0.0, []

    def later(out_NOHW: Tensor, y_N: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.module[1:](out_NOHW), y_N, reduction="sum")

    for c in range(CLASSES):
        g_NOT = grad(later)(conv(x).detach(), torch.full_like(y, c)).flatten(2)
        weighted_NOT = p_NC[:, c, None, None] * g_NOT
        S = S + torch.einsum("not,nut->ou", weighted_NOT, g_NOT) / out_NOT[:, 0].numel()
        grads.append((p_NC[:, c], g_NOT @ a_NTI))
    m = factors.moments("0")
    close(m.Q_A_II @ torch.diag(m.eig_A_I) @ m.Q_A_II.T, A, 1e-8)
    close(m.Q_S_OO @ torch.diag(m.eig_S_O) @ m.Q_S_OO.T, S, 1e-8)
    assert m.T_mean == a_NTI.shape[1]
    lam = sum((p_N[:, None, None] * (m.Q_S_OO.T @ G @ m.Q_A_II) ** 2).mean(0) for p_N, G in grads)
    close(factors.block("0").lam_OI, lam, 1e-8)
    q_QOI = torch.randn(2, *lam.shape, dtype=torch.float64)
    solved = factors.block("0").solve(q_QOI, Damping(0.1, True))
    close(Eigenblock(lam, m).matvec(solved, Damping(0.1, True)), q_QOI, 1e-8)


@pytest.mark.parametrize("how", ["strided", "reflected"])
def test_an_exact_trace_is_a_dense_solve(how, tmp_path):
    model, data = made(how)
    weights = {n: p.detach() for n, p in model.module.named_parameters()}
    names = ["0", "2", "5"]

    def flat(found) -> Tensor:
        """Every layer's weight with its bias as the last column, laid flat, whatever stands before."""
        parts = []
        for n in names:
            lead = found[f"{n}.bias"].ndim - 1
            matrix = found[f"{n}.weight"].flatten(lead + 1)
            parts.append(torch.cat([matrix, found[f"{n}.bias"][..., None]], -1).flatten(lead))
        return torch.cat(parts, -1)

    J_NCP = flat(jacrev(lambda w: functional_call(model.module, w, data.inputs["x"]))(weights))
    p_NC = model.module(data.inputs["x"]).softmax(1).detach()
    H_NCC = torch.diag_embed(p_NC) - p_NC[:, :, None] * p_NC[:, None]
    G = torch.einsum("ncp,ncd,ndq->pq", J_NCP, H_NCC, J_NCP) / N
    product = Products(model, find_layers(model.module, "*"), data)
    close(product(torch.eye(len(G), dtype=G.dtype)), G, 1e-9)
    close(product.theta_P, flat(weights), 1e-15)
    loss_NP = flat({n: by for name in names for n, by in _stored(model, data, name).items()})
    asked = up.Measurements(data)
    given = {"layers": "*", "dtype": "float64", "damping": 0.01, "rank": "full", "held_out": 0}
    found = up.trace(model, data, asked, out=tmp_path, curvature="exact", **given).frame()[asked.ids].to_numpy()
    wanted_NQ = loss_NP @ torch.linalg.solve(G + 0.01 * torch.eye(len(G), dtype=G.dtype), loss_NP.T)
    close(torch.tensor(found), wanted_NQ, 1e-5)  # the tables are in float32


def _stored(model: up.Model, data: up.Examples, name: str) -> dict[str, Tensor]:
    G_NOI = by_autograd(model, data, name)
    return {f"{name}.weight": G_NOI[..., :-1], f"{name}.bias": G_NOI[..., -1]}


@pytest.mark.parametrize("how", HOW)
def test_positions_and_multiplications_are_counted(how):
    model, data = made(how)
    conv, x = model.module.get_submodule("0"), data.inputs["x"]
    assert rows_seen(conv, x) == unfolded(conv, x)[..., 0].numel() == conv(x)[:, 0].numel()
    layers = up.tracked_layers(model, data, "*")
    assert [layer.rows for layer in layers] == [rows_seen(conv, x) / N, model.module[:3](x)[0, 0].numel(), 1]
    assert weight_OI(conv).shape == (layers[0].O, layers[0].I)
    with FlopCounterMode(display=False) as counter:
        model.module(x[:1])
    shape = model_shape(model, layers, data)
    assert shape.forward(1) == counter.get_total_flops() / 2


def test_a_layer_of_several_calls_adds_them(tmp_path):
    """The same convolution twice, on images of two sizes: one weight, whose gradient is the sum over both calls."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, CLASSES)

        def forward(self, x):
            x = nn.functional.avg_pool2d(torch.tanh(self.conv(x)), 2)
            return self.head(torch.tanh(self.conv(x)).mean((2, 3)))

    torch.manual_seed(1)
    model, data = up.Model(Twice().double(), task=up.Classification()), made("plain")[1]
    close(captured(model, data).found["conv"], by_autograd(model, data, "conv"), 1e-10)


def test_a_convolution_in_groups_is_refused_by_name_and_left_out_of_all():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2))])

    net = Blocks()
    with pytest.raises(ModelError, match=r"layer 'blocks\.0\.1' cannot be tracked: got a convolution in groups"):
        find_layers(net, "*.1")
    found = find_layers(net, "all")
    assert [x.name for x in found] == ["blocks.0.0"]
    assert any("cannot be tracked" in x["why"] for x in coverage(net, found).untracked)
    with pytest.raises(ModelError, match=r"no batch of images: got an input of shape \(2, 5, 5\)"):
        unfolded(net.blocks[0][0], torch.zeros(2, 5, 5))
