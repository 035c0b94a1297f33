"""Products and linear layers by oneDNN: the numbers of torch, its gradients, and only where they are meant to be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from upriver import kernels
from upriver.kernels import FastKernels, add_second_moment, matmul
from upriver.model import capture
from upriver.tensors import Scratch, rotated_gradients, sequence_gradients, symmetric

PLAIN = Path(__file__).parent / "plain.py"
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    """On all processors."""
    monkeypatch.setattr(kernels, "WIDE_ONEDNN", kernels.ONEDNN)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(64, 64, 64), (200, 513, 96), (70, 96, 2049), (1, 96, 96), (0, 96, 96)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_float64(dtype, shape, turned, bias):
    torch.manual_seed(0)
    M, I, K = shape
    x_MI, b_K = torch.randn(M, I, dtype=dtype), torch.randn(K, dtype=dtype)
    y_IK = torch.randn(K, I, dtype=dtype).T if turned else torch.randn(I, K, dtype=dtype)
    found = matmul(x_MI, y_IK, b_K if bias else None)
    expected = x_MI.double() @ y_IK.double() + (b_K.double() if bias else 0)
    assert found.dtype == dtype
    assert found.shape == (M, K)
    assert M == 0 or error(found, expected) < CLOSE[dtype]


def test_factors_with_gaps_are_multiplied_as_fast_and_right():
    """oneDNN takes a thousand times longer over a second factor with gaps, so it must not be given one."""
    whole = torch.randn(200, 300)
    x_MI, y_IK = whole[:, :128], whole[:128, :100]
    assert kernels.suits(x_MI, y_IK.contiguous(), None)
    assert not kernels.suits(x_MI, y_IK, None)
    assert error(matmul(x_MI, y_IK), x_MI.double() @ y_IK.double()) < CLOSE[torch.float32]


def test_a_large_factor_is_not_copied(monkeypatch):
    x_MI, y_IK = torch.randn(200, 128), torch.randn(128, 100)
    monkeypatch.setattr(kernels, "PACKED_BYTES", y_IK.nbytes)
    assert kernels.suits(x_MI, y_IK, None)
    monkeypatch.setattr(kernels, "PACKED_BYTES", y_IK.nbytes - 1)
    assert not kernels.suits(x_MI, y_IK, None)


@pytest.mark.parametrize(("left", "right"), [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)])
def test_other_types_are_left_to_torch(left, right):
    assert not kernels.suits(torch.ones(64, 64, dtype=left), torch.ones(64, 64, dtype=right), None)


@pytest.mark.parametrize(("N", "put"), [(0, False), (1, False), (3, False), (1, True), (3, True)])
@pytest.mark.parametrize("O", [96, 700])
def test_gradients_of_sequences(N, put, O):
    """Also of some of the outputs, whose rows lie apart."""
    torch.manual_seed(0)
    a_NTI, g_NTO = torch.randn(N, 64, 513), torch.randn(N, 64, O + 10)[..., 3:-7]
    assert kernels.suits(torch.ones(O, 64), torch.ones(64, 513))
    out_NOI = torch.full((N, O, 513), torch.nan) if put else None
    found = sequence_gradients(a_NTI, g_NTO, out_NOI)
    assert found.shape == (N, O, 513)
    assert not put or found is out_NOI
    assert N == 0 or error(found, g_NTO.double().mT @ a_NTI.double()) < CLOSE[torch.float32]


@pytest.mark.parametrize("I", [383, 384, 513, 1500])
def test_second_moments_of_wide_layers(I):
    torch.manual_seed(0)
    x_MI, total_II = torch.randn(200, I), torch.zeros(I, I)
    add_second_moment(total_II, x_MI)
    add_second_moment(total_II, 2 * x_MI.T.contiguous().T)
    assert error(symmetric(total_II), 5 * x_MI.double().T @ x_MI.double()) < CLOSE[torch.float32]


@pytest.mark.parametrize("T", [64, 300, 600])
def test_rotated_gradients(T):
    """Rotated on either side of the sum."""
    torch.manual_seed(0)
    (I, O), scratch = (400, 257), Scratch()
    a_NTI, g_NTO, Q_A_II, Q_S_OO = (torch.randn(s) for s in ((2, T, I), (2, T, O), (I, I), (O, O)))
    wide = [x.double() for x in (Q_S_OO.T, g_NTO.mT, a_NTI, Q_A_II)]
    expected = wide[0] @ (wide[1] @ wide[2]) @ wide[3]
    for reused in (None, scratch, scratch):
        assert error(rotated_gradients(a_NTI, g_NTO, Q_A_II, Q_S_OO, reused), expected) < 2 * CLOSE[torch.float32]


def test_everything_runs_with_the_operations_of_torch_instead():
    """``plain.py`` takes the place of the whole file, before anything is imported, in a process of its own."""
    done = subprocess.run([sys.executable, PLAIN], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-5


def test_importing_the_package_changes_nothing_and_its_command_sets_what_the_libraries_read():
    names = "'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OPENBLAS_THREAD_TIMEOUT'"
    look = f"print([os.environ.get(name) for name in ({names})], 'torch' in sys.modules)"
    script = (
        f"import os, sys, upriver; {look}; upriver.load_model; {look}\n"
        "import upriver.cli, upriver.run; upriver.cli.main = lambda: None; upriver.run.main(); " + look
    )
    clean = {k: v for k, v in os.environ.items() if "OMP" not in k and "OPENBLAS" not in k}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[None, None, None] False",
        "[None, None, None] True",
        "['passive', '30000', '4'] True",
    ]


def test_a_pass_on_another_device_is_left_to_torch():
    seen = []

    class Note(nn.Linear):
        def forward(self, x):
            seen.append(type(F.linear(x, self.weight, self.bias).grad_fn).__name__)
            return super().forward(x)

    on_meta = nn.Sequential(Note(256, 256, device="meta"))
    with capture.frozen(on_meta):
        on_meta(torch.ones(256, 256, device="meta", requires_grad=True))
    assert seen == ["AddmmBackward0"]


def frozen(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return layer.to(dtype).requires_grad_(False)


def run(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradient of a loss that is not linear in the output."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), x.grad]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("layer", [nn.Linear(96, 160), nn.Linear(96, 160, bias=False), Conv1D(160, 96)])
@pytest.mark.parametrize("shape", [(80, 96), (3, 40, 96), (2, 3, 40, 96)])
def test_a_frozen_linear_layer_gives_what_torch_gives(layer, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    expected = run(frozen(layer, torch.float64), x.double())
    with FastKernels():
        found = run(frozen(layer, dtype), x)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) < 2 * CLOSE[dtype]


def test_its_gradient_can_be_differentiated():
    torch.manual_seed(0)
    layer, x = frozen(nn.Linear(96, 160)), torch.randn(80, 96, requires_grad=True)

    def curvature() -> torch.Tensor:
        (g,) = torch.autograd.grad(layer(x).exp().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    expected = curvature()
    with FastKernels():
        assert type(layer(x).grad_fn).__name__ == "LinearBackward"
        assert torch.allclose(curvature(), expected, rtol=1e-4)


def test_only_frozen_layers_on_plain_tensors_are_replaced():
    x = torch.randn(80, 96, requires_grad=True)

    def ours(layer: nn.Module) -> bool:
        made_by = layer(x).grad_fn
        if type(made_by).__name__ == "ViewBackward0":  # what a Conv1D gives
            made_by = made_by.next_functions[0][0]
        return type(made_by).__name__ == "LinearBackward"

    with FastKernels():
        assert ours(frozen(nn.Linear(96, 160)))
        assert ours(frozen(Conv1D(160, 96)))
        assert not ours(nn.Linear(96, 160))
        bias_only = frozen(nn.Linear(96, 160))
        bias_only.bias.requires_grad_(True)
        assert not ours(bias_only)
        with torch.autocast("cpu", torch.bfloat16):
            assert nn.Linear(96, 160).requires_grad_(False)(x).dtype == torch.bfloat16
    assert not ours(frozen(nn.Linear(96, 160)))


def test_a_scaled_sum_is_left_alone():
    b, x, W = torch.randn(160), torch.randn(80, 96), torch.randn(96, 160)
    with FastKernels():
        scaled = torch.addmm(b, x, W, beta=2.0)
        found = torch.addmm(torch.ones(80, 160), x, W)
    assert torch.allclose(scaled, 2 * b + x @ W, atol=1e-4)
    assert torch.allclose(found, x @ W + 1, atol=1e-4)


def test_transforms_of_functions_pass_through():
    layer, x = frozen(nn.Linear(96, 160)), torch.randn(5, 70, 96)
    expected = torch.func.vmap(layer)(x)
    _, tangent = torch.func.jvp(lambda t: F.linear(t, layer.weight), (x,), (x,))
    with FastKernels():
        assert torch.allclose(torch.func.vmap(layer)(x), expected, atol=1e-5)
        _, found = torch.func.jvp(lambda t: F.linear(t, layer.weight), (x,), (x,))
    assert torch.allclose(found, tangent, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_what_a_layer_gives_may_be_written_over(biased):
    """As models do that clamp their projections in place; the layer below makes its output part of the graph."""
    net = nn.Sequential(
        nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 160, biased), nn.ReLU(inplace=True), nn.Linear(160, 96)
    )
    x = torch.randn(5, 70, 96, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    frozen(net)
    with FastKernels():
        (found,) = torch.autograd.grad(net(x).square().sum(), x)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
