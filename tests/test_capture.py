"""Capture: inputs, output gradients and sequence gradients are the oracle's, and the model is left as it was found."""

import numpy as np
import pytest
import torch
from torch import nn

import reference
from captured import kept
from cases import CASES, case
from upriver.errors import ModelError
from upriver.influence.queries import gradients as query_gradients
from upriver.influence.queries import measurements
from upriver.model.capture import capture
from upriver.model.check import tracked_layers
from upriver.model.layers import find_layers
from upriver.model.sweep import Labels
from upriver.tensors import sequence_gradients

ALL = sorted(CASES)
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("batch_tokens", [1, 10_000], ids=["alone", "padded"])
@pytest.mark.parametrize("stream", [None, 1], ids=["own", "drawn"])
@pytest.mark.parametrize("name", ALL)
def test_sequence_gradients_are_autograds(name, stream, batch_tokens):
    c = case(name)
    found = kept(c, batch_tokens, Labels(3, stream))
    for row in range(len(c.data)):
        wanted = reference.gradient(c.model.module, c.names, c.loss(row, 3, stream))
        for n in c.names:
            torch.testing.assert_close(found.grads[n, row], wanted[n], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2"])
def test_attention_layers_too(name):
    c = case(name)
    names = [x.name for x in find_layers(c.model.module, "all")]
    assert set(c.names) < set(names)
    found = kept(c, 10_000, spec="all")
    for row in (0, 3, 5):
        wanted = reference.gradient(c.model.module, names, c.loss(row))
        for n in names:
            torch.testing.assert_close(found.grads[n, row], wanted[n], **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_inputs_and_output_gradients_position_by_position(name):
    c = case(name)
    found = kept(c, 10_000)
    for row in range(0, len(c.data), 3):
        wanted = reference.pairs(c.model.module, c.names, c.loss(row))
        for n in c.names:
            calls, length = wanted[n].a_CTI.shape[:2]
            a, g = (x[n, row].unflatten(0, (calls, -1)) for x in (found.a, found.g))
            assert not g[:, length:].any()  # nothing reaches the padding
            got = token_sums(a[:, :length], g[:, :length])  # the order of a layer's calls is free
            torch.testing.assert_close(got, reference.token_gradients(wanted[n]), **CLOSE)
            torch.testing.assert_close(moment(a[:, :length]), moment(wanted[n].a_CTI), **CLOSE)
            torch.testing.assert_close(moment(g[:, :length]), moment(wanted[n].g_CTO), **CLOSE)


def token_sums(a_CTI, g_CTO):
    return torch.einsum("cti,cto->toi", a_CTI, g_CTO)


def moment(x_CTI):
    return torch.einsum("cti,ctj->tij", x_CTI, x_CTI)


@pytest.mark.parametrize("name", ALL)
def test_query_gradients_and_measurements(name):
    c = case(name)
    layers = tracked_layers(c.model, c.data, c.spec)
    found = query_gradients(c.model, layers, c.queries, list(range(len(c.queries))))
    values = measurements(c.model, c.queries)
    for q in range(len(c.queries)):
        wanted = reference.gradient(c.model.module, c.names, c.measurement(q))
        for n in c.names:
            torch.testing.assert_close(found[n][q], wanted[n], **CLOSE)
        np.testing.assert_allclose(values[q], c.measurement(q)(c.model.module).item(), rtol=1e-12)


def state(module: nn.Module):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in module.modules()]
    attributes = [sorted(vars(m)) for m in module.modules()]
    flags = [(p.requires_grad, p.grad is None, p._version) for p in module.parameters()]
    return hooks, attributes, flags, [m.training for m in module.modules()]


@pytest.mark.parametrize("name", ["llama", "twice", "classifier"])
def test_the_model_is_left_as_it_was_found(name):
    c = CASES[name]()
    module, rows = c.model.module, np.arange(4)
    batch = c.data.batch(rows)
    for i, (m, p) in enumerate(zip(list(module.modules())[1:], module.parameters(), strict=False)):
        m.training, p.requires_grad = bool(i % 2), bool(i % 3)
    before, weights = state(module), {k: v.clone() for k, v in module.state_dict().items()}
    output = c.model.task.measurement(module, batch)
    layers = find_layers(module, c.spec)
    for consume in (lambda *given: None, broken):
        try:
            with capture(module, layers, consume) as run:
                run(len(rows), c.model.task.positions(batch), lambda: c.model.task.loss(module, batch))
        except ZeroDivisionError:
            assert consume is broken
        assert state(module) == before
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
    torch.testing.assert_close(c.model.task.measurement(module, batch), output, rtol=0, atol=0)


def broken(*given):
    raise ZeroDivisionError


@pytest.mark.parametrize("name", ["gpt2", "twice"])
def test_what_is_handed_over_in_a_narrower_type_is_rounded_once(name):
    """Mixed precision: the model computes as it did."""
    c = CASES[name]()
    batch = c.data.batch(np.arange(4))
    layers = find_layers(c.model.module, c.spec)

    def seen(dtype):
        given = {}
        with capture(c.model.module, layers, lambda layer, *ag: given.update({layer.name: ag}), dtype) as run:
            run(4, c.model.task.positions(batch), lambda: c.model.task.loss(c.model.module, batch))
        return given

    narrow = seen(torch.bfloat16)
    for layer, whole in seen(None).items():
        assert all(torch.equal(x, y.bfloat16()) for x, y in zip(narrow[layer], whole, strict=True))


class InPlace(nn.Module):
    """Writes over the output of its first layer, as code that saves memory does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])

    def forward(self, x):
        h = torch.tanh(x)
        return self.layers[1](self.layers[0](h).mul_(2).relu_() + h)


def test_an_output_written_over_gives_the_same_gradients():
    module, grads = InPlace().double(), {}
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])

    def consume(layer, a, g):
        grads[layer.name] = sequence_gradients(a, g)

    with capture(module, find_layers(module, "*"), consume) as run:
        run(3, None, lambda: nn.functional.cross_entropy(module(x), y, reduction="sum"))
    for n in range(3):
        wanted = reference.gradient(module, list(grads), reference.class_loss(x[n], y[n]))
        for name in grads:
            torch.testing.assert_close(grads[name][n], wanted[name], **CLOSE)


class Overwritten(InPlace):
    """Writes over the input of its first layer."""

    def forward(self, x):
        h = torch.tanh(x)
        y = self.layers[0](h)
        return self.layers[1](y + h.mul_(2))


def run_on_ones(module: nn.Module, spec: str = "*") -> None:
    with capture(module, find_layers(module, spec), lambda *given: None) as run:
        run(2, None, lambda: module(torch.ones(2, 4)).sum())


def test_an_input_written_over_is_refused():
    with pytest.raises(ModelError, match=r"the input of layer 'layers\.0' is written over"):
        run_on_ones(Overwritten())
    run_on_ones(Overwritten(), "layers.1")


def test_dropout_is_off_whatever_the_mode():
    c = CASES["gpt2"]()
    c.model.module.train()
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in c.model.module.modules())
    found = kept(c, 10_000)
    assert c.model.module.training
    c.model.module.eval()
    wanted = reference.gradient(c.model.module, c.names, c.loss(1))
    for n in c.names:
        torch.testing.assert_close(found.grads[n, 1], wanted[n], **CLOSE)


class InPlaceAbove(nn.Module):
    """Writes over what a biased layer gives of an input of three axes, which is a view, above another tracked layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 3)])

    def forward(self, x):
        return self.layers[2](self.layers[1](torch.tanh(self.layers[0](x))).relu_())


def test_a_view_written_over_keeps_its_gradient():
    module, grads = InPlaceAbove().double(), {}
    x_NTI = torch.randn(3, 5, 4, dtype=torch.float64)

    def consume(layer, a, g):
        grads[layer.name] = sequence_gradients(a, g)

    with capture(module, find_layers(module, "*"), consume) as run:
        run(3, 5, lambda: module(x_NTI).square().sum())
    for n in range(3):
        wanted = reference.gradient(module, list(grads), lambda m, n=n: m(x_NTI[n : n + 1]).square().sum())
        assert len(wanted) == 3
        for name in wanted:
            torch.testing.assert_close(grads[name][n], wanted[name], **CLOSE)


def scaled(m, args, output):
    return 3 * torch.tanh(output)


def scaled_in_place(m, args, output):
    output.mul_(3)


@pytest.mark.parametrize("hook", [scaled, scaled_in_place])
def test_a_users_hook_on_a_layer_leaves_its_gradient_that_of_the_weight(hook):
    module, grads = InPlaceAbove().double(), {}
    module.layers[1].register_forward_hook(hook)
    x_NTI = torch.randn(2, 5, 4, dtype=torch.float64)

    def consume(layer, a, g):
        grads[layer.name] = sequence_gradients(a, g)

    with capture(module, find_layers(module, "*"), consume) as run:
        run(2, 5, lambda: module(x_NTI).square().sum())
    loss = module(x_NTI).square().sum()
    weight, bias = torch.autograd.grad(loss, [module.layers[1].weight, module.layers[1].bias])
    torch.testing.assert_close(grads["layers.1"].sum(0), torch.cat([weight, bias[:, None]], 1), **CLOSE)


class Merging(nn.Linear):
    """As LoRA layers that merge their weight for evaluation."""

    def train(self, mode: bool = True):
        if mode != self.training:
            self.weight.data.mul_(0.5 if mode else 2.0)
        return super().train(mode)


def test_modes_are_put_back_by_the_modules_themselves():
    module = nn.Sequential(nn.Linear(4, 4), Merging(4, 3)).train()
    before = module[1].weight.detach().clone()
    with capture(module, find_layers(module, "0"), lambda *given: None) as run:
        run(2, None, lambda: module(torch.ones(2, 4)).sum())
    assert module[1].training
    assert torch.equal(module[1].weight, before)
