"""A table of tiny float64 models with data: every way in which a weight can be stored, shared and called.

Axes: N sequences, T tokens, V vocabulary, H width.
"""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import reference
from upriver.influence.queries import Measurements
from upriver.model.layers import Layer, find_layers
from upriver.model.load import Model
from upriver.model.losses import LanguageModel, Sampler, sample
from upriver.model.tasks import Classification, Regression
from upriver.runtime.artifact import digest
from upriver.text import batch as batches
from upriver.text.batch import Batch, Sequences
from upriver.text.examples import Examples

V, H = 11, 8


class Windows(Sequences):
    """Sequences of token ids with a mask of the tokens that are predicted with loss."""

    def __init__(self, tokens: list[np.ndarray], loss: list[np.ndarray], keys_N: np.ndarray | None = None):
        self.tokens, self.loss = tokens, loss
        self.lengths_N = np.array([len(t) for t in tokens], np.int32)
        hashes_N = np.array([batches.sequence_hash(*pair) for pair in zip(tokens, loss, strict=True)], np.uint64)
        self.keys_N = batches.sequence_keys(hashes_N) if keys_N is None else keys_N
        self.fingerprint = digest([[t.tolist() for t in tokens], [m.tolist() for m in loss]])

    def batch(self, rows: np.ndarray) -> Batch:
        return batches.pad(rows, self.keys_N[rows], [self.tokens[r] for r in rows], [self.loss[r] for r in rows])

    def permuted(self, order: np.ndarray) -> "Windows":
        return Windows([self.tokens[i] for i in order], [self.loss[i] for i in order])


class Questions:
    """Each question is a few rows of ``windows`` with weights: +1 the completion, -1 the contrast."""

    def __init__(self, windows: Windows, rows: list[list[tuple[int, float]]]):
        self.windows, self.rows = windows, rows
        self.ids = [f"q{i}" for i in range(len(rows))]
        self.fingerprint = digest([windows.fingerprint, rows])
        self.lengths = np.array([sum(int(windows.lengths_N[row]) for row, _ in pairs) for pairs in rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices) -> Batch:
        pairs = [(i, row, weight) for i in indices for row, weight in self.rows[i]]
        b = self.windows.batch(np.array([row for _, row, _ in pairs]))
        weight_N = torch.tensor([weight for *_, weight in pairs])
        return Batch(b.rows_N, b.keys_N, b.inputs, b.real_NT, weight_N, np.array([i for i, *_ in pairs]))


class Case(NamedTuple):
    """A model, what it was trained on, what is asked, and the layers that ``spec`` must find (``bias`` is a last column)."""

    model: Model
    data: Windows | Examples
    queries: Questions | Measurements
    spec: str
    names: list[str]

    @property
    def language(self) -> bool:
        return isinstance(self.data, Windows)

    @property
    def layers(self) -> list[Layer]:
        return find_layers(self.model.module, self.spec)

    def labels(self, row: int, seed: int = 0, stream: int | None = None) -> torch.Tensor:
        """What the loss of a sequence compares with, its own or drawn: ``[T]`` next tokens (-1 without loss), or ``[K]``."""
        batch = self.data.batch(np.array([row]))
        sampler = None if stream is None else Sampler(seed, stream, batch.keys_N)
        if not self.language:
            return self._example_labels(batch, sampler)
        tokens_T, following = batch.inputs["tokens"][0], _next(batch, 0)
        if sampler is not None:
            logits_TV = self.model.module(input_ids=tokens_T[None], use_cache=False).logits[0].detach()
            drawn = sample(logits_TV, sampler.uniform(len(tokens_T))[0, :, 0])
            following = torch.where(following >= 0, drawn, -1)
        return following

    def loss(self, row: int, seed: int = 0, stream: int | None = None) -> reference.Loss:
        """The loss of one sequence as the oracle writes it, with its own labels or with drawn ones."""
        return _oracle_loss(self, self.data.batch(np.array([row])), 0, self.labels(row, seed, stream))

    def outputs(self, row: int) -> reference.Loss:
        """What is predicted wherever a sequence has loss, ``[M, C]``."""
        batch = self.data.batch(np.array([row]))
        if not self.language:
            return lambda call: call(batch.inputs["x"])
        tokens_1T, at_T = batch.inputs["tokens"], _next(batch, 0) >= 0
        return lambda call: call(input_ids=tokens_1T, use_cache=False).logits[0][at_T]

    def measurement(self, query: int) -> reference.Loss:
        """``f`` of one question as the oracle writes it."""
        batch = self.queries.batch([query])
        labels = [_next(batch, n) if self.language else batch.inputs["y"][n] for n in range(len(batch.rows_N))]
        losses = [_oracle_loss(self, batch, n, label) for n, label in enumerate(labels)]
        weights = batch.weight_N.tolist()
        return lambda call: sum(-w * f(call) for w, f in zip(weights, losses, strict=True))

    def _example_labels(self, batch: Batch, sampler: Sampler | None) -> torch.Tensor:
        y_K = batch.inputs["y"][0].reshape(-1)
        if sampler is None:
            return y_K
        out_1K = self.model.module(batch.inputs["x"]).detach()
        if isinstance(self.model.task, Classification):
            return sample(out_1K, sampler.uniform(1)[:, 0, 0])
        return (out_1K - torch.special.ndtri(sampler.uniform(1, out_1K.shape[1])[:, 0]))[0]


class Truth(NamedTuple):
    """What the oracle finds for a case: moments, and the sequences' gradients that the eigenvalues are measured on."""

    moments: reference.Moments
    grads: list[reference.Layers]

    def curvature(self, kind: str, name: str) -> reference.Basis:
        A, S, T_mean = (part[name] for part in self.moments)
        return reference.curvature(kind, A, S, T_mean, [G[name] for G in self.grads])


@cache
def truth(name: str, drawn: bool = True) -> Truth:
    """With the labels that a fit of seed 0 draws: stream 1 for the moments, stream 2 for the eigenvalues; or its own."""
    c = case(name)
    first, second = (1, 2) if drawn else (None, None)
    rows = range(len(c.data))
    each = [reference.pairs(c.model.module, c.names, c.loss(row, 0, first)) for row in rows]
    grads = [reference.gradient(c.model.module, c.names, c.loss(row, 0, second)) for row in rows]
    return Truth(reference.moments(each), grads)


def _next(batch: Batch, n: int) -> torch.Tensor:
    """The token that follows each position of a row, -1 where it carries no loss."""
    return torch.where(batch.inputs["loss"][n], batch.inputs["tokens"][n], -1).roll(-1)


def _oracle_loss(case: Case, batch: Batch, n: int, labels: torch.Tensor) -> reference.Loss:
    if case.language:
        length = int(batch.real_NT[n].sum())
        return reference.token_loss(batch.inputs["tokens"][n, :length], labels[:length])
    kind = reference.class_loss if isinstance(case.model.task, Classification) else reference.squared_loss
    return kind(batch.inputs["x"][n], labels)


@cache
def case(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return CASES[name]()


def _losses(c: Case, seed: int, stream: int | None) -> list[reference.Loss]:
    return [c.loss(row, seed, stream) for row in range(len(c.data))]


@cache
def gradients(name: str, stream: int | None = None, seed: int = 0) -> list[reference.Layers]:
    """The oracle's gradient of every sequence's loss."""
    c = case(name)
    return [reference.gradient(c.model.module, c.names, loss) for loss in _losses(c, seed, stream)]


@cache
def pairs(name: str, stream: int | None = None, seed: int = 0) -> list[dict[str, reference.Pair]]:
    """The oracle's layer inputs and output gradients of every sequence."""
    c = case(name)
    return [reference.pairs(c.model.module, c.names, loss) for loss in _losses(c, seed, stream)]


@cache
def measured(name: str) -> list[reference.Layers]:
    """The oracle's gradient of every measurement: minus that of the loss of what is asked, contrasts taken off."""
    c = case(name)
    return [reference.gradient(c.model.module, c.names, c.measurement(q)) for q in range(len(c.queries))]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Assert that two tensors differ by at most ``tolerance`` of the largest entry of the second."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error = float((found.double() - expected).abs().max().detach())
    assert error <= tolerance * float(expected.abs().max().detach()), f"off by {error:.3g}"


def _language(module: nn.Module, names: list[str], sequences: int = 14, most: int = 7) -> Case:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, V, n) for n in rng.integers(2, most + 1, sequences)]
    loss = [np.ones(len(t), bool) for t in tokens]
    for i in range(0, sequences, 3):  # prompts: their tokens carry no loss, but gradient reaches them through attention
        loss[i][: len(tokens[i]) // 2] = False
    data = Windows(tokens, loss)
    asked = [rng.integers(0, V, n) for n in (5, 4, 6, 6)]
    windows = Windows(asked, [np.arange(len(t)) >= 3 for t in asked])
    queries = Questions(windows, [[(0, 1.0)], [(1, 1.0)], [(2, 1.0), (3, -1.0)]])
    for p in module.parameters():  # a norm of ones and a bias of zeros would hide mistakes
        p.data = p.data.double() + 0.3 * torch.randn(p.shape, dtype=torch.float64)
    return Case(Model(module.double().eval(), task=LanguageModel()), data, queries, "mlp", names)


def llama() -> Case:
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attn_implementation="sdpa",
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    for name, m in list(module.named_modules()):
        if type(m).__name__ == "LlamaRMSNorm":  # it computes in float32 whatever the model's type
            module.set_submodule(name, nn.RMSNorm(H, eps=1e-6))
    return _language(module, [f"model.layers.{i}.mlp.{k}_proj" for i in (0, 1) for k in ("gate", "up", "down")])


def neox() -> Case:
    config = GPTNeoXConfig(
        vocab_size=V, hidden_size=H, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        rotary_pct=1.0, max_position_embeddings=16, use_parallel_residual=True, attn_implementation="sdpa",
    )  # fmt: skip
    names = [f"gpt_neox.layers.{i}.mlp.dense_{k}" for i in (0, 1) for k in ("h_to_4h", "4h_to_h")]
    return _language(GPTNeoXForCausalLM(config), names)


def gpt2() -> Case:
    config = GPT2Config(
        vocab_size=V, n_positions=8, n_embd=H, n_layer=2, n_head=2, n_inner=5, bos_token_id=None, eos_token_id=None
    )  # fmt: skip
    return _language(GPT2LMHeadModel(config), [f"transformer.h.{i}.mlp.c_{k}" for i in (0, 1) for k in ("fc", "proj")])


class Block(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.up, self.down = nn.Linear(H, 6, bias), nn.Linear(6, H, bias)

    def forward(self, x_NTH: torch.Tensor) -> torch.Tensor:
        count_T1 = torch.arange(1, x_NTH.shape[1] + 1, dtype=x_NTH.dtype, device=x_NTH.device)[:, None]
        return x_NTH + self.down(torch.tanh(self.up(x_NTH.cumsum(1) / count_T1)))


class Small(nn.Module):
    """A causal language model whose tokens see the mean of those before them; every block runs ``times`` times."""

    def __init__(self, blocks: int, times: int, bias: bool):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.blocks = nn.ModuleList(Block(bias) for _ in range(blocks))
        self.head = nn.Linear(H, V)
        self.times = times

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        x_NTH = self.embed(input_ids)
        for block in [*self.blocks] * self.times:
            x_NTH = block(x_NTH)
        return SimpleNamespace(logits=self.head(x_NTH))


def twice() -> Case:
    return _language(Small(blocks=1, times=2, bias=True), ["blocks.0.up", "blocks.0.down"])


def shared() -> Case:
    module = Small(blocks=2, times=1, bias=False)
    case = _language(module, ["blocks.0.up", "blocks.0.down", "blocks.1.down"])
    module.blocks[1].get_submodule("up").weight = module.blocks[0].get_submodule("up").weight
    return case


def classifier() -> Case:
    x_NI, x_QI = torch.randn(20, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    queries = Measurements(Examples({"x": x_QI, "y": torch.tensor([0, 1, 2])}))
    return Case(
        Model(module, task=Classification()),
        Examples({"x": x_NI, "y": torch.randint(3, (20,))}),
        queries,
        "*",
        ["0", "2"],
    )


def regressor() -> Case:
    x_NI, x_QI = torch.randn(20, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    queries = Measurements(Examples({"x": x_QI, "y": torch.randn(3, 2, dtype=torch.float64)}))
    data = Examples({"x": x_NI, "y": torch.randn(20, 2, dtype=torch.float64)})
    return Case(Model(module, task=Regression()), data, queries, "*", ["0", "2"])


CASES = {f.__name__: f for f in (llama, neox, gpt2, twice, shared, classifier, regressor)}
