"""Losses with drawn labels, and the head in chunks: statistics, independence of the batch, the Gauss-Newton matrix."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import reference
from captured import kept
from cases import CASES, V, Windows, case
from upriver.errors import ModelError
from upriver.model.capture import capture, frozen
from upriver.model.head import LinearHead, Tail, ending, token_losses
from upriver.model.layers import find_layers
from upriver.model.load import Model
from upriver.model.losses import LanguageModel, Sampler, drawn_exactly, sample
from upriver.model.sweep import Labels
from upriver.model.tasks import Regression
from upriver.runtime.cost import CACHES
from upriver.tensors import sequence_gradients

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


LOGITS = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5], [3.0, 3.0, -30.0, 0.0, 1.0]], dtype=torch.float64)


def exactly(logits_MV: torch.Tensor, u_M: torch.Tensor) -> torch.Tensor:
    """As labels are drawn on a GPU."""
    return drawn_exactly(logits_MV.softmax(-1), u_M)


DRAWS = pytest.mark.parametrize("draw", [sample, exactly])


@DRAWS
@pytest.mark.parametrize("spread", [1, 100], ids=["together", "over blocks"])
def test_sampled_labels_follow_the_softmax(draw, spread):
    """Chi-square over 40,000 draws a row: below the 99.9 % point of 4 degrees of freedom (fixed seed)."""
    u = Sampler(0, 1, np.arange(40_000, dtype=np.uint64)).uniform(2)[..., 0]
    for row in (0, 1):
        logits_V = torch.full((spread * 5 - spread + 1,), float("-inf"), dtype=torch.float64)
        logits_V[::spread] = LOGITS[row]
        drawn = draw(logits_V.expand(40_000, -1), u[:, row])
        expected = 40_000 * LOGITS[row].softmax(0)
        counts = torch.bincount(drawn, minlength=len(logits_V))
        assert counts[::spread].sum() == 40_000
        counts = counts[::spread]
        likely = expected > 5
        assert not counts[expected < 1e-6].any()
        chi = ((counts - expected) ** 2 / expected)[likely].sum()
        assert chi < 18.47


@DRAWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_label_without_probability_is_never_drawn(dtype, draw):
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf"), float("-inf")]], dtype=dtype).expand(4, -1)
    drawn = draw(logits, torch.tensor([2.0**-54, 0.5, 1 - 2.0**-53, 1.0], dtype=torch.float64))
    assert drawn.tolist() == [1, 2, 2, 2]


@pytest.mark.parametrize("V", [1, 127, 128, 129, 1000, 4096])
def test_labels_are_those_at_which_the_cumulative_distribution_passes_the_random_number(V):
    """Found in float64; from float32 it is another one where ``u`` lies next to a border."""
    torch.manual_seed(0)
    p_MV, u_M = torch.randn(500, V).mul(2).softmax(-1), torch.rand(500, dtype=torch.float64)
    cumulative_MV = p_MV.double().cumsum(1)
    cumulative_MV /= cumulative_MV[:, -1:].clone()
    wanted = (cumulative_MV > u_M[:, None]).int().argmax(1)
    border_M = (cumulative_MV - u_M[:, None]).abs().min(1).values < 1e-6
    assert border_M.sum() < 50
    assert torch.equal(drawn_exactly(p_MV, u_M)[~border_M], wanted[~border_M])
    at_the_end = drawn_exactly(p_MV, torch.ones(500, dtype=torch.float64))
    assert torch.equal(at_the_end, torch.full_like(at_the_end, V - 1))


def test_labels_on_a_gpu_take_no_sum_of_floats_that_depends_on_its_order(monkeypatch):
    """``cumsum`` of floats is what CUDA refuses under ``use_deterministic_algorithms``."""
    cumsum = torch.Tensor.cumsum

    def refused(x, *args, **kwargs):
        assert not x.is_floating_point()
        return cumsum(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cumsum", refused)
    drawn_exactly(torch.randn(4, 300).softmax(-1), torch.rand(4))


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
    masks = [np.ones(1, bool), np.zeros(3, bool), np.ones(3, bool)]  # the last shows that there is one at all
    data = Windows([np.array([3]), np.array([1, 2, 3]), np.array([1, 2, 3])], masks)
    for size in (1, 100):
        found = kept(c._replace(data=data), size)
        assert [bool(found.grads[n, row].any()) for n in c.names for row in range(3)] == [False, False, True] * len(
            c.names
        )


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
    c.model.task.prepare(module)
    module.requires_grad_(False)
    weight = module.get_submodule(c.names[0]).weight.requires_grad_()
    with pytest.raises(ModelError, match="no second derivative"):
        torch.autograd.grad(c.model.task.loss(module, batch), weight, create_graph=True)


# ------------------------------------------------------------------------------------------ the head, a chunk at a time


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Two loss tokens a chunk, and one at a time of these."""
    monkeypatch.setattr("upriver.model.head.chunks", lambda gpu: CACHES._replace(logits=2 * 4 * V))
    monkeypatch.setattr("upriver.model.head.PART_BYTES", 4 * V)


@pytest.mark.parametrize("stream", [None, 1], ids=["own", "drawn"])
@pytest.mark.parametrize("name", ["llama", "neox", "gpt2"])
def test_the_head_in_chunks_gives_the_same_gradients(name, stream, tiny_chunks):
    c = case(name)
    found = kept(c, 10_000, Labels(3, stream))
    with frozen(c.model.module):
        assert isinstance(ending(c.model.module), LinearHead)  # or this would test nothing
    for row in range(len(c.data)):
        wanted = reference.gradient(c.model.module, c.names, c.loss(row, 3, stream))
        for n in c.names:
            torch.testing.assert_close(found.grads[n, row], wanted[n], **CLOSE)


ENDINGS = {  # what they do to their logits
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 4},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


def ending_so(name: str, **more):
    """The case of a llama with another model in it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=V, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, bos_token_id=0, eos_token_id=1, **more,
    )  # fmt: skip
    c = CASES["llama"]()
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(c.model.dtype).eval()
    names = [n for n, _ in module.named_modules() if n.endswith("down_proj")]
    return c._replace(model=Model(module, task=LanguageModel()), names=names)


@pytest.mark.parametrize("stream", [None, 1], ids=["own", "drawn"])
@pytest.mark.parametrize("name", ENDINGS)
def test_caps_and_scales_after_the_head_go_in_chunks_too(name, stream, tiny_chunks):
    c = ending_so(name, **ENDINGS[name])
    found = kept(c, 10_000, Labels(3, stream), "*.down_proj")
    with frozen(c.model.module):
        assert isinstance(ending(c.model.module), Tail)
    for row in range(len(c.data)):
        wanted = reference.gradient(c.model.module, c.names, c.loss(row, 3, stream))
        for n in c.names:
            torch.testing.assert_close(found.grads[n, row], wanted[n], **CLOSE)


@pytest.mark.parametrize("name", ENDINGS)
def test_no_more_logits_are_made_at_once_than_a_chunk(name, monkeypatch):
    c, most = ending_so(name, **ENDINGS[name]), []
    batch = c.data.batch(np.arange(len(c.data)))
    head = c.model.module.get_output_embeddings()
    linear = type(head).forward
    monkeypatch.setattr(
        type(head), "forward", lambda m, x: (m is head and most.append(x.numel() // x.shape[-1]), linear(m, x))[1]
    )
    monkeypatch.setattr("upriver.model.head.chunks", lambda gpu: CACHES._replace(logits=8 * 4 * V))
    with frozen(c.model.module):
        whole = c.model.task.loss(c.model.module, batch)
        c.model.task.prepare(c.model.module)
        most.clear()
        again = c.model.task.loss(c.model.module, batch)
    assert 1 < max(most) <= 4
    torch.testing.assert_close(again, whole, **CLOSE)


def test_a_copy_of_a_model_finds_its_own_ending():
    """Of the module that it belongs to, not of the one that it was copied from."""
    c = ending_so("gemma2", **ENDINGS["gemma2"])
    task, module = c.model.task, c.model.module
    batch = c.data.batch(np.arange(3))
    other = copy.deepcopy(module)
    with torch.no_grad(), frozen(module), frozen(other):
        task.prepare(module)
        task.loss(module, batch)
        other.get_output_embeddings().weight.mul_(2)
        first = [task.loss(m, batch) for m in (module, other)]
        task.prepare(other)
        second = [task.loss(m, batch) for m in (module, other)]
    assert not torch.allclose(*first)
    torch.testing.assert_close(first, second, **CLOSE)


@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_loss_is_cross_entropy_and_so_is_its_gradient(bias, tiny_chunks):
    torch.manual_seed(0)
    head = nn.Linear(5, V, bias).requires_grad_(False)
    hidden = torch.randn(9, 5, requires_grad=True)
    labels, weight = torch.randint(V, (9,)), torch.randn(9)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        head, x = head.to(dtype), hidden.detach().to(dtype).requires_grad_()
        losses = token_losses(x, LinearHead(head), lambda p, rows: labels[rows])
        (found,) = torch.autograd.grad((losses * weight.to(losses)).sum(), x)
        whole = nn.functional.cross_entropy(head(x).to(losses.dtype), labels, reduction="none")
        (wanted,) = torch.autograd.grad((whole * weight.to(losses)).sum(), x)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(losses, whole, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("far", [50.0, 80.0, 100.0, 1000.0])
def test_a_label_that_the_model_all_but_rules_out_has_its_loss_and_gradient(far):
    """From 88 on its probability is no normal float32 number any more."""
    head, labels = nn.Linear(3, 3, False).requires_grad_(False), torch.tensor([1, 0, 1])
    head.weight.copy_(torch.eye(3))
    hidden = torch.tensor([[far, 0.0, 1.0], [1.0, 0.0, 2.0], [far, -far, 0.0]], requires_grad=True)
    losses = token_losses(hidden, LinearHead(head), lambda p, rows: labels[rows])
    whole = nn.functional.cross_entropy(hidden.detach().double(), labels, reduction="none")
    torch.testing.assert_close(losses, whole.float(), rtol=1e-6, atol=1e-6)
    losses.sum().backward()
    wanted = hidden.detach().double().softmax(-1) - nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(hidden.grad, wanted.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", *ENDINGS])
def test_a_tracked_head_is_a_layer_like_any_other(name):
    c = ending_so(name, **ENDINGS[name]) if name in ENDINGS else case(name)
    head = c.model.module.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # no longer that of the input
    found = kept(c, 10_000, spec="lm_head,*.down_proj")
    for row in (0, 3):
        names = ["lm_head", *(n for n in c.names if n.endswith("down_proj"))]
        wanted = reference.gradient(c.model.module, names, c.loss(row))
        for n in names:
            torch.testing.assert_close(found.grads[n, row], wanted[n], **CLOSE)


class Scaled(nn.Module):
    """A head that is not the last word: its logits are scaled afterwards."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **given):
        out = self.inner(**given)
        out.logits = 0.5 * out.logits
        return out


def test_logits_that_are_scaled_after_the_head_are_taken_whole_where_no_body_can_stand_still():
    c = CASES["llama"]()
    module, task = Scaled(c.model.module), LanguageModel()
    scaled = c._replace(model=Model(module, task=task), names=[f"inner.{n}" for n in c.names])
    for _ in range(2):  # what the first pass finds out holds for the second
        found = kept(scaled, 10_000)
        for n in scaled.names:
            wanted = reference.gradient(module, scaled.names, scaled.loss(3))
            torch.testing.assert_close(found.grads[n, 3], wanted[n], **CLOSE)


class Masked(LlamaForCausalLM):
    """Writes over what its head gives, as Chameleon does with tokens that stand for images."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., : V // 2] = torch.finfo(out.logits.dtype).min
        return out


def test_logits_that_are_written_over_are_not_those_of_the_head(tiny_chunks):
    c = case("llama")
    module = Masked(c.model.module.config).double().eval()
    model, batch = Model(module), c.data.batch(np.arange(3))
    with torch.no_grad():
        losses = [model.task.loss(module, batch)]
        model.task.prepare(module)
        losses.append(model.task.loss(module, batch))
        logits_NTV = module(input_ids=batch.inputs["tokens"]).logits
    tokens_NT, loss_NT = batch.inputs["tokens"], batch.inputs["loss"]
    labels_NT = tokens_NT.where(loss_NT, -100).roll(-1, 1)
    expected = torch.nn.functional.cross_entropy(logits_NTV.flatten(0, 1), labels_NT.flatten(), reduction="sum")
    for loss in losses:
        torch.testing.assert_close(loss, expected)
