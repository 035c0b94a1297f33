"""What must be true of the method whatever the model; each test carries the number of its invariant.

1  sum over layers = sum over tokens = sum over output tokens = the total
2  EK-FAC tends to the exact block for one layer with independent ``a`` and ``g``; K-FAC is exact for deep linear networks
3  the trace of EK-FAC is the mean squared gradient in any bases, and it is nearer to the block than K-FAC
4  with damping far above the curvature, scores times damping are the gradient dot products
5  (dense solves against finite differences: ``test_solvers.py``)
6  batch size, padding, number of processes and resume point change nothing
7  rank = the smaller side of a layer is full rank
8  a small step in the solved direction of a sequence moves ``f`` by its influence, to first order
9  permuting sequences permutes scores

Axes: N sequences, T tokens, Q queries, O outputs and I inputs of a layer, K outputs of a model.
"""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import cases
import reference
import upriver as up
from cases import case, close
from hook_cases import ROUNDS, fit_and_trace, in_processes
from upriver.curvature.blocks import Moments
from upriver.curvature.consumers import Correction
from upriver.influence.queries import gradients as query_gradients
from upriver.influence.rescore import output_token_influence, rescore
from upriver.model.check import tracked_layers
from upriver.model.sweep import Labels, Source, sweep
from upriver.text.batch import Batch

LANGUAGE = ["llama", "neox", "gpt2", "twice", "shared"]
EVERY = [*LANGUAGE, "classifier", "regressor"]
FLOAT32 = 2e-6  # scores are stored in float32


def scores(result: up.Scores) -> Tensor:
    """``[N, Q]`` of a finished trace."""
    frame = pd.read_parquet(result.path / "scores.parquet").sort_values("sequence")
    return torch.from_numpy(frame[[q["id"] for q in result.queries]].to_numpy(np.float64, copy=True))


def traced(name: str, out: Path, data=None, factors=None, batch_tokens: int = 30, **options) -> Tensor:
    """``[N, Q]``: a case fitted and traced through the public functions in float64."""
    c = case(name)
    data = c.data if data is None else data
    if factors is None:
        factors = up.fit(c.model, data, out / "factors", layers=c.spec, dtype="float64", batch_tokens=batch_tokens)
    given = {"rank": "full", "top": 3, "batch_tokens": batch_tokens, **options}
    return scores(up.trace(c.model, data, c.queries, factors, out / "scores", **given))


def dot_products(name: str) -> Tensor:
    """Minus the dot products of the oracle's gradients, ``[N, Q]``."""
    return torch.stack(
        [torch.stack([reference.score(q, G) for q in cases.measured(name)]) for G in cases.gradients(name)]
    )


# 1


@pytest.mark.parametrize("name", LANGUAGE)
def test_invariant_1_layers_tokens_and_output_tokens_each_sum_to_the_total(name, fitted):
    c, factors = case(name), fitted(name)
    layers, queries = tracked_layers(c.model, c.data, c.spec), range(len(c.queries))
    solved = factors.curvature().solve(query_gradients(c.model, layers, c.queries), up.Damping()).value
    wanted = {row: list(queries) for row in range(len(c.data))}
    found = rescore(c.model, layers, c.data, solved, wanted, 30)

    grads = cases.gradients(name)
    by_layer_PL = [
        [-(solved[x.name][q] * grads[row][x.name]).sum() for x in layers]
        for row, q in zip(found.rows_P, found.queries_P, strict=True)
    ]
    total_P = torch.tensor(by_layer_PL, dtype=torch.float64).sum(1)
    assert len(total_P) == len(c.data) * len(queries)
    close(found.layers_PL, torch.tensor(by_layer_PL, dtype=torch.float64), FLOAT32)
    close(found.tokens_PT.double().sum(1), total_P, FLOAT32)

    total_QN = {(q, row): total for row, q, total in zip(found.rows_P, found.queries_P, total_P, strict=True)}
    whole = c.data.batch(np.arange(len(c.data)))
    for q in queries:
        output_NT = output_token_influence(c.model, layers, whole, {n: v[q] for n, v in solved.items()})
        close(output_NT.sum(1), torch.stack([total_QN[q, row] for row in range(len(c.data))]), 1e-9)
        assert not output_NT[~whole.inputs["loss"]].any(), "a token without loss has no log-probability to move"


# 2


class GivenNoise(up.Regression):
    """Least squares whose sampled labels are off by the noise that each example brings: its second moment is exact."""

    def loss(self, module, batch, sampler=None):
        if sampler is None:
            return super().loss(module, batch)
        sampler.uniform(1)  # drawn for each example beforehand
        outputs_NK = self.outputs(module, batch)
        return ((outputs_NK - outputs_NK.detach() + batch.inputs["noise"]) ** 2).sum() / 2


def gauss_newton(module: nn.Module, name: str, x_NI: Tensor) -> Tensor:
    """The block of ``G`` for squared error: the mean of ``J^T J`` with ``J`` by ``torch.func``, ``[O I, O I]``."""
    weight = {f"{name}.weight": module.get_submodule(name).weight.detach()}
    each = vmap(lambda x_I: jacrev(lambda w: functional_call(module, w, (x_I,)))(weight)[f"{name}.weight"])
    J_NKP = each(x_NI).flatten(2).detach()
    return torch.einsum("nkp,nkq->pq", J_NKP, J_NKP) / len(x_NI)


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def dense(factors: up.Factors, name: str, kind: str) -> Tensor:
    block = factors.block(name, kind)
    return reference.Basis(block.lam_OI, block.basis.Q_S_OO, block.basis.Q_A_II).dense()


def test_invariant_2_one_layer_with_independent_a_and_g_tends_to_the_exact_block(tmp_path):
    torch.manual_seed(0)
    fixed = nn.Linear(3, 4, bias=False)  # makes the gradient of the tracked layer's output anisotropic
    module = nn.Sequential(nn.Linear(5, 3, bias=False), fixed).double()
    errors = []
    for N in (500, 8000):
        x_NI = torch.randn(N, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
        data = up.Examples({"x": x_NI, "y": torch.zeros(N, 4, dtype=torch.float64)})
        model = up.Model(module, task=up.Regression())
        factors = up.fit(model, data, tmp_path / str(N), layers="0", dtype="float64", batch_tokens=1000)
        errors.append(distance(dense(factors, "0", "ekfac"), gauss_newton(module, "0", x_NI)))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 2.5, f"16 times the examples should divide the error by about 4: {errors}"


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "tanh"])
def test_invariant_2_kfac_is_exact_for_a_deep_linear_network_with_squared_error(linear, tmp_path):
    torch.manual_seed(0)
    between = nn.Identity if linear else nn.Tanh
    wide = [nn.Linear(4, 5, bias=False), between(), nn.Linear(5, 6, bias=False), between(), nn.Linear(6, 3, bias=False)]
    module = nn.Sequential(*wide).double()
    for i in (0, 2, 4):
        nn.init.orthogonal_(module[i].weight, gain=1.5)
    x_NI = torch.randn(7, 4, dtype=torch.float64)
    noise_KK = 3**0.5 * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q  # mean of outer products: identity
    inputs = {"x": x_NI.repeat_interleave(3, 0), "noise": noise_KK.repeat(7, 1)}
    data = up.Examples({**inputs, "y": torch.zeros(21, 3, dtype=torch.float64)})
    model = up.Model(module, task=GivenNoise())
    factors = up.fit(model, data, tmp_path / "factors", layers="*", dtype="float64")
    for name in ("0", "2"):
        exact = gauss_newton(module, name, x_NI)
        for kind in ("kfac", "ekfac"):
            error = distance(dense(factors, name, kind), exact)
            assert error < 1e-10 if linear else error > 1e-3, f"{kind} of layer {name}: {error:.2e}"


# 3


@pytest.mark.parametrize("name", EVERY)
def test_invariant_3_trace_is_the_mean_squared_norm_in_any_orthogonal_bases(name, fitted):
    c, factors = case(name), fitted(name)
    layers = tracked_layers(c.model, c.data, c.spec)
    generator = torch.Generator().manual_seed(0)

    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q

    bases = {x.name: Moments(orthogonal(x.I), orthogonal(x.O), torch.ones(x.I), torch.ones(x.O), 1.0) for x in layers}
    sums: dict[str, Tensor] = {}
    consumer = Correction(sums, torch.float64, bases)
    source = Source.of(c.data, np.arange(len(c.data)), 30, Labels(0, 2))
    sweep(c.model, layers, source, source.rows, consumer)
    half_N = torch.from_numpy((c.data.keys_N & np.uint64(1)).astype(np.int64))  # which of the two that are compared
    assert torch.equal(sums["sequences"], torch.bincount(half_N, minlength=2))
    assert sums["sequences"].min() > 0
    for x in layers:
        squares_N = torch.stack([G[x.name].square().sum() for G in cases.truth(name).grads])
        close(sums[f"lam:{x.name}"].sum((1, 2)), torch.zeros(2).double().index_add(0, half_N, squares_N))
        expected = squares_N.mean()
        close(factors.block(x.name).lam_OI.sum(), expected)
        close(factors.block(x.name, "diagonal").lam_OI.sum(), expected)


@pytest.mark.parametrize("name", EVERY)
def test_invariant_3_ekfac_is_never_further_from_the_block_than_kfac(name, fitted):
    c, factors = case(name), fitted(name)
    for layer in c.names:
        grads_NP = torch.stack([G[layer].flatten() for G in cases.truth(name).grads])
        exact = grads_NP.T @ grads_NP / len(c.data)
        ekfac, kfac = (distance(dense(factors, layer, kind), exact) for kind in ("ekfac", "kfac"))
        assert ekfac < kfac
        block = factors.block(layer)
        for scale in (0.9, 1.1):  # nothing else on the diagonal of this basis is nearer
            other = reference.Basis(block.lam_OI * scale, block.basis.Q_S_OO, block.basis.Q_A_II)
            assert ekfac < distance(other.dense(), exact)


# 4


OTHERS = [(name, kind) for kind in ("kfac", "diagonal") for name in ("gpt2", "classifier")]


@pytest.mark.parametrize(("name", "kind"), [*((name, "ekfac") for name in EVERY), *OTHERS])
def test_invariant_4_large_damping_gives_the_gradient_dot_product(name, kind, fitted, tmp_path):
    expected_NQ, factors = dot_products(name), fitted(name)
    largest = max(float(factors.block(x, kind).lam_OI.max()) for x in case(name).names)
    errors = []
    for times in (10, 1000, 1e9):
        damping = times * largest
        scores_NQ = traced(name, tmp_path / str(times), None, factors, damping=str(damping), curvature=kind)
        errors.append(distance(scores_NQ * damping, expected_NQ))
    assert errors[2] < FLOAT32
    assert 70 < errors[0] / errors[1] < 110, f"a hundredth of the error for a hundred times the damping: {errors}"


# 6


class Padded:
    """A corpus whose batches have more padding than they need, filled with tokens that mean something."""

    def __init__(self, data: cases.Windows, extra: int = 3):
        self.data, self.extra = data, extra
        self.lengths_N, self.fingerprint = data.lengths_N, data.fingerprint
        self.plan, self.sample = data.plan, data.sample

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, rows: np.ndarray) -> Batch:
        b = self.data.batch(rows)
        wider = {name: nn.functional.pad(t, (0, self.extra)) for name, t in b.inputs.items()}
        real_NT = nn.functional.pad(b.real_NT, (0, self.extra))
        wider["tokens"][~real_NT] = 7
        return Batch(b.rows_N, b.keys_N, wider, real_NT)


@pytest.mark.parametrize("name", EVERY)
def test_invariant_6_batch_size_changes_nothing(name, tmp_path):
    one_by_one = traced(name, tmp_path / "1", batch_tokens=1)
    for batch_tokens in (17, 1000):
        close(traced(name, tmp_path / str(batch_tokens), batch_tokens=batch_tokens), one_by_one, FLOAT32)


@pytest.mark.parametrize("name", ["llama", "neox", "twice", "shared"])
def test_invariant_6_padding_changes_nothing(name, tmp_path):
    data = case(name).data
    close(traced(name, tmp_path / "padded", Padded(data)), traced(name, tmp_path / "plain"), FLOAT32)


def files(folder: Path) -> dict[str, Path]:
    """What counts of a folder of results: tables, eigenvectors, eigenvalues, scores by layer."""
    kinds = ("*.safetensors", "*.parquet", "*.npy")
    return {str(p.relative_to(folder)): p for kind in kinds for p in folder.rglob(kind)}


def assert_equal_bits(found: Path, expected: Path) -> None:
    ours, theirs = files(found), files(expected)
    assert ours.keys() == theirs.keys()
    assert any("eigen/unit" in name for name in ours)
    assert any("lam." in name for name in ours)
    for name, path in theirs.items():
        if path.suffix == ".parquet":
            pd.testing.assert_frame_equal(pd.read_parquet(ours[name]), pd.read_parquet(path), check_exact=True)
        elif path.suffix == ".npy":
            np.testing.assert_array_equal(np.load(ours[name]), np.load(path))
        else:
            one, other = load_file(ours[name]), load_file(path)
            assert one.keys() == other.keys(), name
            assert all(torch.equal(one[k], other[k]) for k in other), name


class StoppedError(Exception):
    pass


def stopped(consumer: str, after: int, out: Path, monkeypatch) -> None:
    """Start ``fit_and_trace`` and stop it in the middle of a pass, when ``consumer`` has been called ``after`` times."""
    module, name = consumer.rsplit(".", 1)
    kind = getattr(__import__(module, fromlist=[name]), name)
    call, calls = kind.__call__, []

    def count(self, *args):
        calls.append(1)
        if len(calls) > after:
            raise StoppedError
        return call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", count)
        with pytest.raises(StoppedError):
            fit_and_trace(0, out)


CONSUMERS = {
    "upriver.curvature.consumers.Covariance": 50,
    "upriver.curvature.consumers.Correction": 50,
    "upriver.influence.queries.TokenGradients": 7,
    "upriver.influence.score.Score": 50,
    "upriver.influence.rescore.TokenScores": 30,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    fit_and_trace(0, out)
    return out


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_invariant_6_resume_point_changes_no_bit(consumer, uninterrupted, tmp_path, monkeypatch):
    stopped(consumer, CONSUMERS[consumer], tmp_path, monkeypatch)
    if not consumer.endswith(("Gradients", "TokenScores")):
        assert list(tmp_path.rglob("sum-*")) + list(tmp_path.rglob("scan/*/unit-*")), "nothing was done before the stop"
    fit_and_trace(0, tmp_path)
    assert_equal_bits(tmp_path, uninterrupted)


def test_invariant_6_number_of_processes_changes_nothing_but_rounding(uninterrupted, tmp_path, monkeypatch):
    """Each process adds up its own units, and their sums are added in the order of the processes."""
    begun = tmp_path / "begun"
    begun.mkdir()
    stopped("upriver.curvature.consumers.Correction", 50, begun, monkeypatch)  # one process begins, two go on
    in_processes(2, fit_and_trace_in_every_way, tmp_path)
    fit_and_trace(0, tmp_path / "alone", *ROUNDS)
    for found, expected in (("fresh", uninterrupted), ("begun", uninterrupted), ("rounds", tmp_path / "alone")):
        tables = [
            pd.read_parquet(folder / "scores" / "scores.parquet") for folder in (tmp_path / found, Path(expected))
        ]
        ours, theirs = (table.select_dtypes("float32").to_numpy(np.float64) for table in tables)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
        assert files(tmp_path / found).keys() == files(Path(expected)).keys()
    assert {"factors/diagonal/lam.safetensors", "scores/layers.npy"} <= files(tmp_path / "rounds").keys()


def fit_and_trace_in_every_way(rank: int, folder: Path) -> None:
    """From the start, from where another run was stopped, and in rounds with sums that are kept on the disk."""
    fit_and_trace(rank, folder / "fresh")
    fit_and_trace(rank, folder / "begun")
    fit_and_trace(rank, folder / "rounds", *ROUNDS)


# 7


@pytest.mark.parametrize("name", EVERY)
def test_invariant_7_rank_of_the_smaller_side_is_full_rank(name, fitted, tmp_path):
    factors = fitted(name)
    full_NQ = traced(name, tmp_path / "full", None, factors)
    smaller = max(min(x.O, x.I) for x in factors.layers)
    for rank in (smaller, 100):
        close(traced(name, tmp_path / str(rank), None, factors, rank=rank), full_NQ, 10 * FLOAT32)
    assert distance(traced(name, tmp_path / "one", None, factors, rank=1), full_NQ) > 1e-3, "rank one is not full"


# 8


def moved(module: nn.Module, step: dict[str, Tensor]) -> nn.Module:
    """A copy with ``step`` ``[O, I]`` (bias last) added to the weights."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, step_OI in step.items():
            layer = module.get_submodule(name)
            weight_OI = step_OI if layer.bias is None else step_OI[:, :-1]
            layer.weight += weight_OI.T if type(layer).__name__ == "Conv1D" else weight_OI
            if layer.bias is not None:
                layer.bias += step_OI[:, -1]
    return module


@pytest.mark.parametrize("name", EVERY)
def test_invariant_8_a_small_step_on_a_sequence_moves_the_measurement_by_its_influence(name, fitted, tmp_path):
    c, factors = case(name), fitted(name)
    I_NQ = traced(name, tmp_path, None, factors)
    for row, q in ((0, 0), (4, 1), (11, 2)):
        u = factors.curvature().solve({n: G[None] for n, G in cases.gradients(name)[row].items()}, up.Damping()).value
        length = torch.cat([x.flatten() for x in u.values()]).norm()

        def change(eps: float, u=u, q=q) -> float:
            f = c.measurement(q)
            return float(
                (f(moved(c.model.module, {n: -eps * x[0] for n, x in u.items()})) - f(c.model.module)).detach()
            )

        large, small = 2e-3 / float(length), 2e-4 / float(length)
        errors = [abs(change(eps) / eps - float(I_NQ[row, q])) for eps in (large, small)]
        assert errors[1] < 0.01 * abs(float(I_NQ[row, q])) + 0.002 * float(I_NQ.abs().max())
        assert errors[1] < errors[0] / 5 + 2 * FLOAT32 * float(I_NQ.abs().max()), "the error is of second order"


# 9


@pytest.mark.parametrize("name", EVERY)
def test_invariant_9_permuting_sequences_permutes_scores_and_leaves_the_factors(name, fitted, tmp_path):
    c, before = case(name), fitted(name, max_tokens=12)
    order = np.random.default_rng(1).permutation(len(c.data))
    if c.language:
        data = c.data.permuted(order)
    else:
        data = up.Examples({key: x[torch.from_numpy(order)] for key, x in c.data.inputs.items()})
    after = up.fit(c.model, data, tmp_path / "factors", layers=c.spec, dtype="float64", batch_tokens=30, max_tokens=12)
    assert after.manifest["fit"]["sequences"] < len(data), "a part of them, and the same part"
    assert data.fingerprint != c.data.fingerprint
    for layer in c.names:
        close(dense(after, layer, "ekfac"), dense(before, layer, "ekfac"), 1e-7)
    scores_NQ = traced(name, tmp_path / "before", None, before)
    assert not torch.allclose(scores_NQ[order], scores_NQ)
    close(traced(name, tmp_path / "after", data, after), scores_NQ[order], 1e-5)
