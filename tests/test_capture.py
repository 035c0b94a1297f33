"""Capture: inputs, output gradients and sequence gradients are the oracle's, and the model is left as it was found."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import reference
from cases import CASES, Windows, case
from upriver.errors import ModelError
from upriver.influence.gradients import measurements, query_gradients
from upriver.model.capture import capture
from upriver.model.layers import find_layers
from upriver.model.losses import LanguageModel, Regression, Sampler, sample
from upriver.model.sweep import Labels, sweep, tracked_layers
from upriver.tensors import sequence_gradients
from upriver.text.batch import Batch

ALL = sorted(CASES)
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Keep:
    """Consumer: everything that capture hands over, by layer and corpus row."""

    def __init__(self):
        self.a, self.g, self.grads, self.real_NT = {}, {}, {}, None

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, layer, a_NTI, g_NTO) -> None:
        for n, row in enumerate(self.batch.rows_N.tolist()):
            self.a[layer.name, row], self.g[layer.name, row] = a_NTI[n], g_NTO[n]
            self.grads[layer.name, row] = sequence_gradients(a_NTI, g_NTO)[n]


def kept(c, batch_tokens: int, labels: Labels = Labels(), spec: str | None = None) -> Keep:  # noqa: B008
    keep, layers = Keep(), tracked_layers(c.model, c.data, spec or c.spec)
    sweep(c.model, layers, c.data, c.data.plan(batch_tokens), keep, labels)
    return keep


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


LOGITS = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5], [3.0, 3.0, -30.0, 0.0, 1.0]], dtype=torch.float64)


def test_sampled_labels_follow_the_softmax():
    """Chi-square over 40,000 draws a row: below the 99.9 % point of 4 degrees of freedom (fixed seed)."""
    u = Sampler(0, 1, np.arange(40_000, dtype=np.uint64)).uniform(2)[..., 0]
    for row in (0, 1):
        drawn = sample(LOGITS[row].expand(40_000, -1), u[:, row])
        expected = 40_000 * LOGITS[row].softmax(0)
        counts = torch.bincount(drawn, minlength=5)
        likely = expected > 5
        assert not counts[expected < 1e-6].any()
        chi = ((counts - expected) ** 2 / expected)[likely].sum()
        assert chi < 18.47


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_label_without_probability_is_never_drawn(dtype):
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf"), float("-inf")]], dtype=dtype).expand(3, -1)
    drawn = sample(logits, torch.tensor([2.0**-54, 0.5, 1 - 2.0**-53], dtype=torch.float64))
    assert drawn.tolist() == [1, 2, 2]


def test_uniform_numbers_depend_on_seed_stream_key_and_position_alone():
    keys = np.array([5, 9, 2**63], np.uint64)
    u = Sampler(0, 1, keys).uniform(6)
    assert torch.equal(Sampler(0, 1, keys[[2, 0]]).uniform(9)[:, :6], u[[2, 0]])
    others = [Sampler(1, 1, keys), Sampler(0, 2, keys), Sampler(2**63 - 1, 1, keys)]
    for other in others:
        assert not (other.uniform(6) == u).any()
    assert len(u.unique()) == u.numel()
    assert ((u > 0) & (u < 1)).all()


def test_uniform_numbers_of_neighbours_are_independent():
    """Correlations between positions, sequences, streams and seeds stay within four standard errors."""
    keys = np.arange(4_000, dtype=np.uint64)
    first, second, seed = (Sampler(*s, keys).uniform(3)[..., 0] for s in ((0, 1), (0, 2), (1, 1)))
    pairs = [
        (first[:, 0], first[:, 1]),
        (first[:-1, 0], first[1:, 0]),
        (first[:, 0], second[:, 0]),
        (first[:, 0], seed[:, 0]),
    ]
    for x, y in pairs:
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / len(x) ** 0.5


def test_drawn_labels_do_not_depend_on_the_batch():
    c = case("llama")
    alone, together = (kept(c, size, Labels(0, 1)) for size in (1, 10_000))
    order = np.random.default_rng(0).permutation(len(c.data))
    c2 = c._replace(data=c.data.permuted(order))
    permuted = kept(c2, 30, Labels(0, 1))
    for n in c.names:
        for row in range(len(c.data)):
            torch.testing.assert_close(alone.grads[n, row], together.grads[n, row], **CLOSE)
            torch.testing.assert_close(permuted.grads[n, row], alone.grads[n, int(order[row])], **CLOSE)
    other = kept(c, 10_000, Labels(0, 2))
    assert not torch.allclose(other.grads[c.names[0], 1], alone.grads[c.names[0], 1])


def test_drawn_labels_of_equal_sequences_differ():
    c = case("llama")
    tokens = np.array([1, 4, 2, 9, 3, 3, 1])
    data = Windows([tokens, tokens], [np.ones(7, bool)] * 2)
    found = kept(c._replace(data=data), 100, Labels(0, 1))
    assert not torch.allclose(found.grads[c.names[0], 0], found.grads[c.names[0], 1])


def test_a_sequence_of_one_token_and_one_without_loss_have_no_gradient():
    c = case("gpt2")
    data = Windows([np.array([3]), np.array([1, 2, 3])], [np.ones(1, bool), np.zeros(3, bool)])
    for size in (1, 100):
        found = kept(c._replace(data=data), size)
        assert not any(g.any() for g in found.grads.values())
        assert len(found.grads) == 2 * len(c.names)


def test_log_probs_stand_at_their_own_token():
    c = case("neox")
    batch = c.data.batch(np.arange(len(c.data)))
    log_p_NT = LanguageModel().log_probs(c.model.module, batch).detach()
    logits = c.model.module(input_ids=batch.inputs["tokens"], use_cache=False).logits.detach().log_softmax(-1)
    for n, t in np.ndindex(*log_p_NT.shape):
        token = int(batch.inputs["tokens"][n, t])
        wanted = float(logits[n, t - 1, token]) if batch.inputs["loss"][n, t] else 0.0
        np.testing.assert_allclose(float(log_p_NT[n, t]), wanted, rtol=1e-12)


COPIES = 4_000


@pytest.mark.parametrize("name", ["gpt2", "twice", "shared", "classifier", "regressor"])
def test_drawn_labels_give_the_gauss_newton_matrix(name):
    """The mean of drawn gradients' outer products, against ``sum_t J_t^T H_t J_t`` (eq. 11): labels of different positions are
    independent, so nothing is left of their products.  Four sequences, each drawn 4,000 times."""
    c, total = case(name), {}
    rows = np.repeat([0, 1, 2, 5], COPIES)
    batch = replace(c.data.batch(rows), keys_N=np.arange(len(rows), dtype=np.uint64))

    def consume(layer, a, g):
        G = sequence_gradients(a, g).flatten(1)
        total[layer.name] = G.T @ G / len(G)

    with capture(c.model.module, find_layers(c.model.module, c.spec), consume) as run:
        sampler = Sampler(0, 1, batch.keys_N)
        run(len(rows), c.model.task.positions(batch), lambda: c.model.task.loss(c.model.module, batch, sampler))
    exact = [gauss_newton(c, row) for row in (0, 1, 2, 5)]
    for n in c.names:
        wanted = sum(G[n] for G in exact) / len(exact)
        assert (total[n] - wanted).norm() < 0.05 * wanted.norm()
        assert total[n].trace().item() == pytest.approx(wanted.trace().item(), rel=0.02)


def gauss_newton(c, row: int) -> dict[str, torch.Tensor]:
    """``sum_t J_t^T H_t J_t`` of one sequence for each layer, ``[O I, O I]``, from the Jacobian of what the model predicts."""
    outputs_MC = c.outputs(row)(c.model.module).detach()
    J = reference.jacobian(c.model.module, c.names, c.outputs(row))
    squared = isinstance(c.model.task, Regression)
    H = [torch.eye(len(z), dtype=z.dtype) if squared else reference.softmax_fisher(z) for z in outputs_MC]
    return {n: sum(j.flatten(1).T @ h @ j.flatten(1) for j, h in zip(J[n], H, strict=True)) for n in c.names}


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


def test_a_loss_without_freezing_trains_the_head_too():
    """The short way past the logits forms no gradient of the head, and so is taken only when the head is frozen."""
    c = CASES["llama"]()
    module, batch = c.model.module, c.data.batch(np.arange(3))
    for _ in range(2):  # the first pass finds the head, the second could go the short way
        module.zero_grad()
        c.model.task.loss(module, batch).backward()
        found = {name: p.grad.clone() for name, p in module.named_parameters()}
    wanted = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for row in range(3):
        module.zero_grad()
        c.loss(row)(module).backward()
        wanted = {name: wanted[name] + p.grad for name, p in module.named_parameters()}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **CLOSE)


def test_the_short_way_past_the_logits_refuses_a_second_derivative():
    c = CASES["llama"]()
    module, batch = c.model.module, c.data.batch(np.arange(3))
    c.model.task.loss(module, batch)
    module.requires_grad_(False)
    weight = module.get_submodule(c.names[0]).weight.requires_grad_()
    with pytest.raises(ModelError, match="no second derivative"):
        torch.autograd.grad(c.model.task.loss(module, batch), weight, create_graph=True)
