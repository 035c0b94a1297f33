"""Second moments in diagonal blocks: solutions are those of dense matrices with zeros between the blocks, and they cost less.

Axes: N sequences, Q queries, T positions, O outputs, I inputs, M tokens.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import cases
import cli_cases
import reference
from cases import Case, close
from test_plan import HERE, SMALL
from test_resume import killed, results
from upriver.curvature.base import Damping
from upriver.curvature.consumers import Covariance
from upriver.curvature.factors import Factors
from upriver.curvature.fit import fit
from upriver.errors import ConfigError, MismatchError
from upriver.influence.queries import gradients as query_gradients
from upriver.model.layers import Layer
from upriver.pipeline import Given, trace
from upriver.runtime.config import TraceOptions
from upriver.runtime.cost import CORRECTION, COVARIANCE, NARROW, LayerSize, diagonal, moments_size, sides, square
from upriver.runtime.divide import divide_trace, eigen_size
from upriver.runtime.plan import Request, budget_for, plan_run
from upriver.runtime.progress import mute, silent
from upriver.show.report import write_report
from upriver.tensors import BlockDiagonal, Scratch, product, rotated_gradients
from upriver.text.batch import Batch

DAMPING = Damping.parse("0.1x")
STORED = 1e-6  # scores are kept in float32
GIVEN = {"dtype": "float64", "batch_tokens": 30}


def neox() -> Case:
    """Sides of 50, 36, 51 and 37, which three does not divide; three blocks of 36 would be too narrow, so there are two."""
    config = GPTNeoXConfig(
        vocab_size=cases.V, hidden_size=36, intermediate_size=50, num_hidden_layers=1, num_attention_heads=2,
        rotary_pct=1.0, max_position_embeddings=16, attn_implementation="sdpa",
    )  # fmt: skip
    names = [f"gpt_neox.layers.0.mlp.dense_{k}" for k in ("h_to_4h", "4h_to_h")]
    return cases._language(GPTNeoXForCausalLM(config), names, sequences=40)


def llama() -> Case:
    """Two layers share an input."""
    config = LlamaConfig(
        vocab_size=cases.V, hidden_size=36, intermediate_size=50, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, attn_implementation="sdpa",
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    for name, m in list(module.named_modules()):
        if type(m).__name__ == "LlamaRMSNorm":  # it computes in float32 whatever the model's type
            module.set_submodule(name, torch.nn.RMSNorm(36, eps=1e-6))
    return cases._language(module, [f"model.layers.0.mlp.{k}_proj" for k in ("gate", "up", "down")], sequences=40)


MODELS = {f.__name__: f for f in (neox, llama)}


@cache
def case(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name]()


@cache
def oracle(name: str) -> tuple[reference.Moments, list[reference.Layers]]:
    """Moments, and gradients for the eigenvalues, with the labels that a fit of seed 0 draws."""
    c = case(name)
    rows = range(len(c.data))
    each = [reference.pairs(c.model.module, c.names, c.loss(row, 0, 1)) for row in rows]
    return reference.moments(each), [reference.gradient(c.model.module, c.names, c.loss(row, 0, 2)) for row in rows]


def cut(matrix: Tensor, blocks: int) -> Tensor:
    """A matrix with zeros outside of its diagonal blocks, of which none is below sixteen wide."""
    n = len(matrix)
    count = next(k for k in range(blocks, 0, -1) if k == 1 or n >= 16 * k)
    at = torch.bucketize(torch.arange(n), torch.tensor([k * n // count for k in range(1, count)]), right=True)
    return matrix * (at[:, None] == at)


@cache
def dense(name: str, blocks: int, kind: str) -> dict[str, reference.Basis]:
    m, grads = oracle(name)
    return {
        n: reference.curvature(kind, cut(m.A[n], blocks), cut(m.S[n], blocks), m.T_mean[n], [G[n] for G in grads])
        for n in case(name).names
    }


@cache
def solved(name: str, blocks: int, kind: str) -> list[reference.Layers]:
    c, bases = case(name), dense(name, blocks, kind)
    asked = [reference.gradient(c.model.module, c.names, c.measurement(q)) for q in range(len(c.queries))]
    v = [{} for _ in asked]
    for n in c.names:
        G, level = bases[n].dense(), 0.1 * float(bases[n].lam.mean())
        columns = torch.stack([f[n].flatten() for f in asked], 1)
        solutions = torch.linalg.solve(G + level * torch.eye(len(G), dtype=G.dtype), columns)
        for v_q, found in zip(v, solutions.T, strict=True):
            v_q[n] = found.reshape(asked[0][n].shape)
    return v


def scored(name: str, v_q: list[reference.Layers]) -> Tensor:
    """The oracle's scores ``[N, Q]`` by given solutions."""
    c = case(name)
    each = [reference.gradient(c.model.module, c.names, c.loss(row)) for row in range(len(c.data))]
    return torch.stack([torch.stack([reference.score(v, G) for v in v_q]) for G in each])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    @cache
    def make(name: str, blocks: int) -> Factors:
        c = case(name)
        return fit(c.model, c.data, tmp_path_factory.mktemp(name), layers=c.spec, blocks=blocks, **GIVEN)

    return make


def traced(name: str, factors: Factors | None, out, **given) -> Tensor:
    c = case(name)
    trace(c.model, c.data, c.queries, factors, out, **{"rank": "full", "top": 2, "batch_tokens": 30, **given})
    table = pd.read_parquet(out / "scores.parquet").sort_values("sequence")
    return torch.tensor(table[c.queries.ids].to_numpy(np.float64))


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
@pytest.mark.parametrize(("name", "blocks"), [("neox", 2), ("neox", 3), ("llama", 3)])
def test_solutions_are_those_of_dense_matrices_with_zeros_between_the_blocks(name, blocks, kind, fitted):
    c, factors = case(name), fitted(name, blocks)
    q = query_gradients(c.model, c.layers, c.queries)
    found, expected = factors.curvature(kind).solve(q, DAMPING).value, solved(name, blocks, kind)
    for n in c.names:
        wanted = torch.stack([v[n] for v in expected])
        close(found[n], wanted, 1e-8)
        whole = torch.stack([v[n] for v in solved(name, 1, kind)])
        assert (whole - wanted).abs().max() > 1e-2 * wanted.abs().max(), "nothing was between the blocks"


@pytest.mark.parametrize(("name", "blocks"), [("neox", 1), ("neox", 2), ("neox", 3), ("llama", 2), ("llama", 3)])
def test_the_sum_of_the_eigenvalues_is_the_mean_squared_gradient(name, blocks, fitted):
    """In any orthogonal basis."""
    _, grads = oracle(name)
    for n in case(name).names:
        expected = torch.stack([G[n].square().sum() for G in grads]).mean()
        close(fitted(name, blocks).block(n).lam_OI.sum(), expected)


@pytest.mark.parametrize(("name", "blocks"), [("neox", 2), ("neox", 3), ("llama", 3)])
def test_scores_from_end_to_end(name, blocks, fitted, tmp_path):
    """Full rank, a rank that keeps all, a low rank in the metric of the blocks, and K-FAC."""
    factors, v = fitted(name, blocks), solved(name, blocks, "ekfac")
    whole, m = scored(name, v), oracle(name)[0]
    for rank in ("full", 64):
        close(traced(name, factors, tmp_path / str(rank), rank=rank), whole, STORED)
    low = [{n: truncated(v_q[n], cut(m.S[n], blocks), cut(m.A[n], blocks), 2) for n in case(name).names} for v_q in v]
    close(traced(name, factors, tmp_path / "2", rank=2), scored(name, low), 1e-5)
    assert (scored(name, low) - whole).abs().max() > 1e-3 * whole.abs().max(), "nothing was cut"
    kfac = traced(name, factors, tmp_path / "kfac", curvature="kfac")
    close(kfac, scored(name, solved(name, blocks, "kfac")), STORED)


def truncated(v_OI: Tensor, S_OO: Tensor, A_II: Tensor, rank: int) -> Tensor:
    """``Wq = S^1/2 v A^1/2`` truncated and mapped back."""
    (root_S, back_S), (root_A, back_A) = map(square_root, (S_OO, A_II))
    U, s, Vh = torch.linalg.svd(root_S @ v_OI @ root_A)
    return back_S @ (U[:, :rank] * s[:rank] @ Vh[:rank]) @ back_A


def square_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=1e-6 * values[-1]).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def test_refined_to_the_end_they_are_the_exact_solutions(fitted, tmp_path):
    """Blocks make another preconditioner and starting point, and the same damping."""
    given = {"damping": "30x", "held_out": 0}
    exact = traced("neox", fitted("neox", 1), tmp_path / "exact", refine=50, **given)
    found = [traced("neox", fitted("neox", 2), tmp_path / str(n), refine=n, **given) for n in (0, 4, 50)]
    off = [float((scores - exact).abs().max() / exact.abs().max()) for scores in found]
    assert off[0] > off[1] > off[2], off
    assert off[2] < 1e-3


def test_what_lies_in_the_folder(fitted, tmp_path):
    """One block has the names without numbers."""
    c = case("neox")
    up, down = (load_file(fitted("neox", 3).path / "eigen" / f"unit-00000{k}.safetensors") for k in (0, 1))
    assert {n: tuple(x.shape) for n, x in up.items() if x.ndim} == {
        "Q_A.0": (18, 18), "Q_A.1": (19, 19), "eig_A": (37,),
        "Q_S.0": (16, 16), "Q_S.1": (17, 17), "Q_S.2": (17, 17), "eig_S": (50,),
    }  # fmt: skip
    names = {"Q_A.0", "Q_A.1", "Q_A.2", "Q_S.0", "Q_S.1", "eig_A", "eig_S", "T_mean", "clamped"}
    assert set(down) == names
    stored = sum(x.nbytes for file in (up, down) for n, x in file.items() if n.startswith("Q_"))
    assert stored == 2 * moments_size([x._replace(parts=3) for x in c.layers])  # float64
    one = load_file(fitted("neox", 1).path / "eigen" / "unit-000000.safetensors")
    assert set(one) == {"Q_A", "Q_S", "eig_A", "eig_S", "T_mean", "clamped"}
    moments = fitted("neox", 3).moments(c.names[0])
    Q_S = torch.block_diag(*moments.Q_S_OO.blocks)
    close(Q_S @ torch.diag(moments.eig_S_O) @ Q_S.T, cut(oracle("neox")[0].S[c.names[0]], 3))


def test_another_number_of_blocks_is_another_fit(tmp_path):
    c = case("neox")
    given = {"layers": c.spec, **GIVEN}
    factors = fit(c.model, c.data, tmp_path, blocks=2, **given)
    said: list[str] = []
    fit(c.model, c.data, tmp_path, blocks=2, say=said.append, **given)
    assert "used as it is" in said[0]
    assert (factors.options.blocks, factors.layers[0].parts) == (2, 2)
    asked = Given(c.model, c.data, c.queries, factors, TraceOptions(layers=c.spec), (), silent, mute)
    assert [x.parts for x in asked.tracked(c.model)] == [2, 2], "the memory of a trace is divided for what was fitted"
    with pytest.raises(MismatchError, match="blocks"):
        fit(c.model, c.data, tmp_path, **given)
    with pytest.raises(ConfigError, match="bad value for 'blocks': got 0"):
        fit(c.model, c.data, tmp_path, blocks=0, **given)


def test_a_fit_goes_on_where_it_died(fitted, tmp_path, monkeypatch):
    """At every commit: what was summed and decomposed in blocks is taken up again."""
    c = case("neox")
    times = 0
    while killed(monkeypatch, 4 + times, lambda: fit(c.model, c.data, tmp_path, layers=c.spec, blocks=3, **GIVEN)):
        times += 1
    assert times > 1
    assert results(tmp_path) == results(fitted("neox", 3).path)


def test_the_run_says_in_how_many_blocks(fitted, tmp_path):
    c, said = case("neox"), []
    fit(c.model, c.data, tmp_path / "factors", layers=c.spec, blocks=2, say=said.append, **GIVEN)
    assert any("A and S in 2 diagonal blocks" in line for line in said)
    for blocks in (1, 2):
        folder = tmp_path / str(blocks)
        traced("neox", fitted("neox", blocks), folder, held_out=0)
        assert json.loads((folder / "manifest.json").read_text())["fit"]["blocks"] == blocks
        write_report(folder, folder / "report.html")
        told = json.loads((folder / "report.json").read_text())["trust"]
        assert ("A and S in 2 diagonal blocks" in json.dumps(told)) == (blocks == 2)


# ---- the pieces


@pytest.mark.parametrize("n", [1, 15, 16, 31, 32, 50, 97, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_blocks_are_even_and_none_is_too_narrow(n, parts):
    found = diagonal(n, parts)
    assert sum(found) == n
    assert max(found) - min(found) <= 1
    assert len(found) == parts or (len(found) < parts and n < (len(found) + 1) * NARROW)
    assert len(found) == 1 or min(found) >= NARROW
    assert square(n, parts) == sum(k * k for k in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_block_diagonal_matrix_multiplies_as_the_dense_one(dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    Q = BlockDiagonal(tuple(torch.randn(n, n, dtype=dtype) for n in (20, 21, 150)))
    full, x = torch.block_diag(*Q.blocks).double(), torch.randn(2, 300, 191, dtype=dtype)
    close(x @ Q, x.double() @ full, tolerance)
    close(Q @ x.mT, full @ x.mT.double(), tolerance)
    close(Q.T @ x.mT, full.T @ x.mT.double(), tolerance)
    close(product(x[0], Q), x[0].double() @ full, tolerance)
    close(product(x[0], Q.T), x[0].double() @ full.T, tolerance)
    scratch = Scratch()
    scratch.product("q", x + 1, Q, 192)
    wide = scratch.product("q", x, Q, 192)
    close(wide[..., :191], x.double() @ full, tolerance)
    assert not wide[..., 191:].any()
    assert Q.to(torch.zeros(0, dtype=torch.float64)).blocks[2].dtype == torch.float64


SIZES = {"S": (24, 25), "A": (17, 18, 18)}  # two blocks of 49, three of 53


@pytest.mark.parametrize("t", [10, 51, 90])
def test_rotated_gradients_are_those_of_the_dense_bases_and_take_what_is_counted(t):
    S, A = (BlockDiagonal(tuple(torch.linalg.qr(torch.randn(n, n)).Q.double() for n in SIZES[x])) for x in "SA")
    a, g = torch.randn(2, t, 53, dtype=torch.float64), torch.randn(2, t, 49, dtype=torch.float64)
    expected = torch.block_diag(*S.blocks).T @ (g.mT @ a) @ torch.block_diag(*A.blocks)
    close(rotated_gradients(a, g, A, S), expected)
    with FlopCounterMode(display=False) as counter:
        rotated_gradients(a, g, A, S)
    layer = LayerSize("a", 49, 53, "a", 0, 3)  # both sides in three, or the S side in two
    counted = CORRECTION.multiplications(layer, t) + (square(49, 2) - square(49, 3)) * min(1, 53 / t)
    assert counted * 2 * 2 * t == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_of_wide_inputs_are_the_blocks_of_the_whole(dtype):
    layer = Layer("x", (), 20, 1300, False, 0, "x", 3)
    a, g, sums = torch.randn(2, 40, 1300).to(dtype), torch.randn(2, 40, 20).to(dtype), {}
    consumer = Covariance(sums, torch.float32)
    consumer.begin(Batch(np.arange(2), np.arange(2, dtype=np.uint64), {}, None))
    for _ in range(2):
        consumer(layer, a, g)
    assert set(sums) == {"A.0:x", "A.1:x", "A.2:x", "S:x", "count:x"}
    assert int(sums["count:x"]) == 160
    whole, at = 2 * (a.flatten(0, 1).double().T @ a.flatten(0, 1).double()), 0
    for k, n in enumerate((433, 433, 434)):
        expected = whole[at : at + n, at : at + n].tril()
        close(sums[f"A.{k}:x"].tril(), expected, 1e-5 if dtype == torch.float32 else 1e-2)
        at += n


# ---- what it costs


def split(parts: int):
    return SMALL._replace(layers=tuple(x._replace(parts=parts) for x in SMALL.layers))


def test_memory_falls_with_the_blocks_and_the_time_of_decompositions_with_their_square():
    whole, parts = SMALL.layers, split(4).layers
    assert moments_size(parts) == moments_size(whole) / 4
    assert sum(n**3 for x in parts for n in sides(x)) == sum(n**3 for x in whole for n in sides(x)) / 16
    assert eigen_size(parts, 1) < eigen_size(whole, 1) / 8
    widest = LayerSize("up", 27_648, 5_120, "up", 0)
    assert eigen_size([widest], 1) > 36e9
    assert eigen_size([widest._replace(parts=4)], 1) < 3e9  # one block in six copies, and the vectors of the others
    for spec in (COVARIANCE, CORRECTION):
        assert spec.held(parts) < spec.held(whole)
        assert spec.multiplications(parts[0], 64) < spec.multiplications(whole[0], 64)


def test_a_plan_says_so():
    plans = [plan_run(Request(1000, 128, queries=8, memory=8 * 10**9), split(b), HERE) for b in (1, 4)]
    of = [{p.name: p for p in plan.passes} for plan in plans]
    for name in ("covariance", "eigendecomposition", "correction"):
        assert of[1][name].peak < of[0][name].peak
        assert of[1][name].flop < of[0][name].flop
    for name in ("queries", "rescore"):
        assert of[1][name].flop < of[0][name].flop
    assert of[1]["eigendecomposition"].seconds == pytest.approx(of[0]["eigendecomposition"].seconds / 16)
    assert plans[1].disk["factors"] < plans[0].disk["factors"]


def test_one_layer_of_a_trace_takes_less():
    wide = SMALL._replace(layers=tuple(x._replace(O=20_000, I=1_000) for x in SMALL.layers[:1]))
    request = Request(1000, 128, queries=8, memory=64 * 10**9)
    budget = budget_for(request, wide, HERE, 64 * 10**9, "float32")
    peaks = [
        divide_trace(wide._replace(layers=(wide.layers[0]._replace(parts=b),)), request.asked, budget).peak["queries"]
        for b in (1, 4)
    ]
    assert peaks[0] - peaks[1] > 2e9


def test_the_command_line_plans_and_fits_in_blocks(tmp_path, capsys, monkeypatch):
    tiny, passes = cli_cases.build(tmp_path), {}
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    for blocks in (1, 2):
        out = tmp_path / f"{blocks}.json"
        asked = ["--queries", 0, "--blocks", blocks, "--hardware", "h100", "--out", out]
        ran = cli_cases.upriver(capsys, monkeypatch, "plan", Path(tiny.model) / "config.json", "1000x16", *asked)
        assert ran.status == 0, ran
        passes[blocks] = {p["name"]: p["flop"] for p in json.loads(out.read_text())["passes"]}
    assert passes[2]["eigendecomposition"] == passes[1]["eigendecomposition"] / 4
    fit_it = lambda blocks: cli_cases.fit(tiny, tmp_path / "factors", "--blocks", blocks)  # noqa: E731
    assert cli_cases.upriver(capsys, monkeypatch, *fit_it(2)).status == 0
    assert Factors(tmp_path / "factors").options.blocks == 2
    refused = cli_cases.upriver(capsys, monkeypatch, *fit_it(0))
    assert refused.status == 2
    assert "--blocks" in refused.err
