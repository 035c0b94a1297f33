"""Capture: inputs, output gradients and sequence gradients are the oracle's, and the model is left as it was found."""

import numpy as np
import pytest
import torch
from torch import nn

import reference
from cases import CASES, Windows, case
from upriver.influence.gradients import measurements, query_gradients
from upriver.model.capture import capture
from upriver.model.layers import find_layers
from upriver.model.losses import Classification, LanguageModel, Sampler, sample
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


def test_drawn_labels_of_a_classifier_give_its_gauss_newton_matrix():
    """The mean of drawn gradients' outer products over many seeds, against J^T (diag p - p p^T) J (eq. 11)."""
    c = case("classifier")
    module, layers = c.model.module, find_layers(c.model.module, "2")
    batch = c.data.batch(np.arange(len(c.data)))
    total, seeds = 0.0, 3_000

    def consume(layer, a, g):
        nonlocal total
        G = sequence_gradients(a, g).flatten(1)
        total = total + G.T @ G / (len(G) * seeds)

    with capture(module, layers, consume) as run:
        for seed in range(seeds):
            run(len(c.data), None, lambda s=seed: Classification().loss(module, batch, Sampler(s, 1, batch.keys_N)))
    exact = gauss_newton(module, batch.inputs["x"])
    assert (total - exact).norm() / exact.norm() < 0.02


def gauss_newton(module, x_NI):
    hidden = module[:2](x_NI)
    a = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=hidden.dtype)], 1).detach()
    blocks = [
        torch.kron(reference.softmax_fisher(z), torch.outer(h, h))
        for z, h in zip(module(x_NI).detach(), a, strict=True)
    ]
    return sum(blocks) / len(blocks)
