"""Scores of ours are those of Kronfluence and of curvlinops, which share no line with it, on the same weights and data.

Labels are the data's own, or all of them with their probability, so that nothing is drawn.  Kronfluence gives scores; matrices of
curvlinops are damped, inverted and multiplied by gradients of ``torch.func`` here.  All is in float64, our tables in float32.

make agreement     installs both programs, runs this and prints the table of docs/truth.md; without them it is skipped

Axes: N examples, T positions, Q questions, P tracked weights.
"""

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import upriver as up
from in_memory import TokenCorpus, TokenQueries

curvlinops = pytest.importorskip("curvlinops")
theirs = pytest.importorskip("make_kronfluence_fixture", reason="kronfluence is not installed")

N, Q, DAMPING, AGREED = 24, 3, 0.02, 1e-4
F64 = torch.float64


class Net(NamedTuple):
    """A network with its examples, the last of which are asked about."""

    module: nn.Module
    x: Tensor
    y: Tensor
    loss: nn.Module  # as curvlinops takes it: the mean over examples
    task: up.Classification | up.Regression

    def examples(self, at: slice) -> up.Examples:
        return up.Examples({"x": self.x[at], "y": self.y[at]})

    def one(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.loss(functional_call(self.module, weights, x[None]), y[None])

    def gradients(self, at: slice) -> Tensor:
        """Each example's gradient of its loss, laid flat in the order of the parameters: ``[N, P]``."""
        weights = {name: p.detach() for name, p in self.module.named_parameters()}
        found = vmap(grad(self.one), (None, 0, 0))(weights, self.x[at], self.y[at])
        return torch.cat([g.flatten(1) for g in found.values()], 1)


def perceptron() -> Net:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(N + Q, 5, dtype=F64), torch.randint(3, (N + Q,))
    return Net(net, x, y, nn.CrossEntropyLoss(), up.Classification())


def regression() -> Net:
    """Of two outputs, whose mean square is half the sum of their squares, as our loss is."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    x, y = torch.randn(N + Q, 5, dtype=F64), torch.randn(N + Q, 2, dtype=F64)
    return Net(net, x, y, nn.MSELoss(), up.Regression())


def convolution() -> Net:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(2, 4, (2, 3), stride=(2, 1), padding=(0, 2)), nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1, dilation=(1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(N + Q, 2, 8, 8, dtype=F64), torch.randint(3, (N + Q,))
    return Net(net, x, y, nn.CrossEntropyLoss(), up.Classification())


NETS = {"perceptron": perceptron, "regression": regression, "convolution": convolution}
TRAIN, ASKED = slice(N), slice(N, None)


class Found(NamedTuple):
    """Scores in our sign, and self-influence where there is any."""

    scores_NQ: np.ndarray
    own_N: np.ndarray | None = None

    def apart(self, other: "Found") -> float:
        """The largest difference, as a share of the largest score of the same question."""
        parts = [(self.scores_NQ, other.scores_NQ)]
        if self.own_N is not None and other.own_N is not None:
            parts.append((self.own_N[:, None], other.own_N[:, None]))
        assert all(a.shape == b.shape and np.abs(b).max(0).min() > 0 for a, b in parts)
        return max(float((np.abs(a - b).max(0) / np.abs(b).max(0)).max()) for a, b in parts)


def ours(place: Path, model: up.Model, data, asked, kind: str, layers: str, fisher: str, **how) -> Found:
    how |= {"curvature": kind, "dtype": "float64"}
    if kind == "exact":
        factors, given = None, {"layers": layers}
    else:
        factors, given = up.fit(model, data, place / "f", dtype="float64", layers=layers, fisher=fisher), {}
    result = up.trace(model, data, asked, factors, place / "s", rank="full", held_out=0, top=1, **how, **given)
    scores_NQ = result.frame().sort_values("sequence")[asked.ids].to_numpy()
    if factors is None:
        return Found(scores_NQ)
    return Found(scores_NQ, up.self_influence(model, data, factors, **how)["self_influence"].to_numpy())


# ---- curvlinops

OPERATORS = {
    "exact": curvlinops.GGNLinearOperator,
    "kfac": curvlinops.KFACLinearOperator,
    "ekfac": curvlinops.EKFACLinearOperator,
}


def with_curvlinops(place: Path, net: str, kind: str, fisher: str) -> float:
    it = NETS[net]()
    data, parameters = it.examples(TRAIN), list(it.module.parameters())
    told: dict[str, Any] = {"check_deterministic": False}
    if kind != "exact":
        told |= {"fisher_type": "type-2" if fisher == "exact" else fisher, "separate_weight_and_bias": False}
    G = dense(OPERATORS[kind](it.module, it.loss, parameters, [(data.inputs["x"], data.inputs["y"])], **told))
    scores_NQ = it.gradients(TRAIN) @ torch.linalg.solve(G, it.gradients(ASKED).T)
    model, asked = up.Model(it.module.requires_grad_(False), task=it.task), up.Measurements(it.examples(ASKED))
    return ours(place, model, data, asked, kind, "*", fisher, damping=DAMPING).apart(Found(scores_NQ.numpy()))


def dense(operator: Any, of: int = 1) -> Tensor:
    """A matrix, one ``of``-th of it, with the damping."""
    eye = torch.eye(operator.shape[1], dtype=F64)
    return torch.as_tensor(operator @ eye).detach() / of + DAMPING * eye


class NextToken(nn.Module):
    """The logits of all positions that predict one, as examples of their own: a Gauss-Newton matrix is a sum over them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, tokens_NT: Tensor) -> Tensor:
        return self.inner(input_ids=tokens_NT, use_cache=False).logits[:, :-1].flatten(0, 1)


def language_with_curvlinops(place: Path) -> float:
    module = theirs.make_model("llama", attn_implementation="eager", hidden_size=8, intermediate_size=12).double()
    tokens = torch.randint(theirs.VOCABULARY, (N + Q, 9), generator=torch.Generator().manual_seed(0))
    weights = {f"inner.{n}.weight": module.get_submodule(n).weight for n in theirs.mlp(module, "llama")}
    predicted, total = NextToken(module), nn.CrossEntropyLoss(reduction="sum")

    def gradients(tokens_NT: Tensor) -> Tensor:
        losses = (total(predicted(t[None]), t[1:]) for t in tokens_NT)
        rows = [torch.autograd.grad(loss, list(weights.values())) for loss in losses]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    data, told = [(tokens[TRAIN], tokens[TRAIN, 1:].flatten())], {"check_deterministic": False, "num_data": N}
    G = dense(curvlinops.GGNLinearOperator(predicted, total, list(weights.values()), data, **told), N)
    scores_NQ = gradients(tokens[TRAIN]) @ torch.linalg.solve(G, gradients(tokens[ASKED]).T)
    corpus, asked = TokenCorpus(list(tokens[TRAIN].numpy())), TokenQueries(list(tokens[ASKED].numpy()), [1] * Q)
    model = up.Model(module.requires_grad_(False))
    return ours(place, model, corpus, asked, "exact", "mlp", "exact", damping=DAMPING).apart(Found(scores_NQ.numpy()))


# ---- Kronfluence


def with_kronfluence(place: Path, net: str, kind: str) -> float:
    model, data, asked, layers, given = (language if net in theirs.CONFIGS else images)(net)
    mine = ours(place, model, data, asked, kind, layers, "empirical")
    fitted = up.Factors(place / "f")
    # Its eigenvalues of K-FAC are per position, ours per sequence; the damping is a share of either's mean.
    positions = {x.name: fitted.moments(x.name).T_mean if kind == "kfac" else 1.0 for x in fitted.layers}
    scores_NQ, own_N = (sum(x / positions[name] for name, x in part.items()) for part in theirs.analysed(*given, kind))
    return mine.apart(Found(-scores_NQ.numpy().T, own_N.numpy()))


def images(net: str) -> tuple:
    it = NETS[net]()
    names = [name for name, m in it.module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    parts = [torch.utils.data.TensorDataset(it.x[at], it.y[at]) for at in (TRAIN, ASKED)]
    given = (copy.deepcopy(it.module), theirs.SumOfLosses(names), *parts)
    model = up.Model(it.module.requires_grad_(False), task=it.task)
    return model, it.examples(TRAIN), up.Measurements(it.examples(ASKED)), "*", given


def language(name: str) -> tuple:
    """With sequences of many lengths, half of which begin with a prompt without loss."""
    module, (train, asking) = theirs.make_model(name).double(), theirs.make_data()
    (tokens, prompts), (asked, begun) = (
        ([x["tokens"][: x["length"]].numpy() for x in items], [int(x["prompt"]) for x in items])
        for items in (train, asking)
    )
    given = (copy.deepcopy(module), theirs.SumOfLogProbs(theirs.mlp(module, name)), train, asking)
    corpus, queries = TokenCorpus(tokens, prompts), TokenQueries(asked, begun)
    return up.Model(module.requires_grad_(False)), corpus, queries, "mlp", given


# ---- what is compared

KINDS = {"identity": "identity", "diagonal": "diagonal", "kfac": "K-FAC", "ekfac": "EK-FAC", "exact": "Gauss-Newton"}
KRONFLUENCE = [(net, kind) for net in ("convolution", "llama", "neox") for kind in KINDS if kind != "exact"]
EXPECTED = [(net, kind, "exact") for net in NETS for kind in OPERATORS]
CURVLINOPS = [*EXPECTED, ("convolution", "kfac", "empirical"), ("convolution", "ekfac", "empirical")]


@pytest.fixture(scope="module")
def agree():
    """Notes a difference, which is bounded; the table of all is printed at the end (``pytest -s``)."""
    found: list[tuple[str, str, str, str, str]] = []

    def note(package: str, net: str, labels: str, kind: str, apart: float) -> None:
        told = {"exact": "all, with their probability", "empirical": "the data's own"}[labels]
        found.append((f"{package.split('-')[0]} {version(package)}", net, told, kind, f"{apart:.1e}"))
        assert apart <= AGREED

    yield note
    names = ["program", "model", "labels"]
    table = pd.DataFrame(found, columns=pd.Index([*names, "kind", "apart"]))
    table = table.pivot(index=names, columns="kind", values="apart").reindex(columns=[*KINDS]).fillna("")
    rows = [[*names, *KINDS.values()], ["---"] * 8, *([*map(str, row)] for row in table.reset_index().to_numpy())]
    print("", *(f"| {' | '.join(row)} |" for row in rows), sep="\n")


@pytest.mark.parametrize(("net", "kind"), KRONFLUENCE)
def test_scores_and_self_scores_are_those_of_kronfluence(net, kind, agree, tmp_path):
    agree("kronfluence", net, "empirical", kind, with_kronfluence(tmp_path, net, kind))


@pytest.mark.parametrize(("net", "kind", "labels"), CURVLINOPS)
def test_scores_are_those_of_matrices_of_curvlinops(net, kind, labels, agree, tmp_path):
    agree("curvlinops-for-pytorch", net, labels, kind, with_curvlinops(tmp_path, net, kind, labels))


def test_scores_of_a_language_model_are_those_of_a_matrix_of_curvlinops(agree, tmp_path):
    agree("curvlinops-for-pytorch", "llama", "exact", "exact", language_with_curvlinops(tmp_path))
