"""Scores agree with the oracle: every curvature, every order of contraction, sequence by sequence, layer and token.

Axes: N sequences, Q queries, T positions, O outputs, I inputs.
"""

from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import torch

import reference
from cases import CASES, case, close, gradients, measured, pairs
from upriver.curvature.base import Damping
from upriver.curvature.fit import CORRECTION_STREAM, COVARIANCE_STREAM
from upriver.errors import ModelError
from upriver.influence.queries import gradients as query_gradients
from upriver.influence.queries import query_chunks, token_gradients
from upriver.influence.rescore import output_token_influence, rescore, spurious
from upriver.influence.score import Score, dots, route
from upriver.model.check import tracked_layers
from upriver.model.sweep import Source, sweep
from upriver.pipeline import trace
from upriver.tensors import LowRank, Scratch

ORDERS = ("tokens", "dense", "rebuilt")
SEED = 3
DAMPING = Damping.parse("0.1x")
STORED = 1e-6  # scores are kept in float32


@cache
def solved(name: str, kind: str = "ekfac") -> list[reference.Layers]:
    """The oracle's ``(G + lambda I)^-1 grad f`` for every query, its own moments and eigenbases throughout."""
    moments = reference.moments(pairs(name, COVARIANCE_STREAM, SEED))
    drawn = gradients(name, CORRECTION_STREAM, SEED)
    v = [{} for _ in measured(name)]
    for n in case(name).names:
        basis = reference.curvature(kind, moments.A[n], moments.S[n], moments.T_mean[n], [G[n] for G in drawn])
        level = 0.0 if kind == "identity" else 0.1 * float(basis.lam.mean())
        for v_q, f in zip(v, measured(name), strict=True):
            v_q[n] = basis.solve(f[n], level)
    return v


@cache
def scores(name: str, kind: str = "ekfac") -> torch.Tensor:
    """The oracle's scores ``[N, Q]``."""
    return torch.stack([torch.stack([reference.score(v, G) for v in solved(name, kind)]) for G in gradients(name)])


def indices(c) -> list[int]:
    return list(range(len(c.queries)))


def full(c, factors) -> dict[str, torch.Tensor]:
    return factors.curvature().solve(query_gradients(c.model, c.layers, c.queries), DAMPING).value


def low_rank(c, factors, rank: int) -> dict[str, LowRank]:
    found = token_gradients(c.model, c.layers, c.queries, indices(c))
    queries = {x.name: found.pop(x, indices(c), c.model.like) for x in c.layers}
    blocks = {x.name: (factors.block(x.name), min(rank, x.O, x.I)) for x in c.layers}
    return {n: block.solve_low_rank(queries[n], DAMPING, R, None) for n, (block, R) in blocks.items()}


def swept(c, layers, batch_tokens: int, consumer) -> torch.Tensor:
    """The scores of a pass, ``[N, Q]``."""
    source = Source.of(c.data, np.arange(len(c.data)), batch_tokens)
    sweep(c.model, layers, source, source.rows, consumer)
    return consumer.result()["scores"]


def streamed(c, solutions, order, batch_tokens=30, rebuild_bytes=1):
    """Scores ``[N, Q]`` of one pass in one order of contraction."""
    layers, like = tracked_layers(c.model, c.data, c.spec), torch.empty(0, dtype=torch.float64)
    routes = {x.name: route(order, partial(solutions.get, x.name), len(c.queries), like) for x in layers}
    consumer = Score(routes, len(c.queries), keep_layers=False, hold=3, rebuild_bytes=rebuild_bytes)
    return swept(c, layers, batch_tokens, consumer)


def traced(c, factors, out, **given) -> torch.Tensor:
    trace(c.model, c.data, c.queries, factors, out, **{"rank": "full", "top": 2, "batch_tokens": 30, **given})
    table = pd.read_parquet(out / "scores.parquet").sort_values("sequence")
    return torch.tensor(table[c.queries.ids].to_numpy(np.float64))


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "identity"])
@pytest.mark.parametrize("name", CASES)
def test_scores_from_end_to_end(name, kind, fitted, tmp_path):
    close(traced(case(name), fitted(name, seed=SEED), tmp_path, curvature=kind), scores(name, kind), STORED)


@pytest.mark.parametrize("rebuild_bytes", [1, 5_000, 20_000, 1 << 30])  # a row of each at a time, some rows, all
def test_rebuilt_in_parts_of_any_size(rebuild_bytes, fitted):
    c = case("neox")
    low = low_rank(c, fitted("neox", seed=SEED), 64)
    close(streamed(c, low, "rebuilt", rebuild_bytes=rebuild_bytes), scores("neox"), STORED)


@pytest.mark.parametrize(("N", "Q"), [(1, 1), (3, 5), (32, 32), (40, 30)])
@pytest.mark.parametrize(("O", "I"), [(6, 4), (7, 5), (1, 9), (64, 513), (3, 5000)])
def test_dots_of_few_and_many_are_the_written_out_sum(N, Q, O, I):
    G_NOI, v_QOI = torch.randn(N, O, I, dtype=torch.float64), torch.randn(Q, O, I, dtype=torch.float64)
    close(dots(G_NOI, v_QOI), torch.einsum("noi,qoi->nq", G_NOI, v_QOI))


@pytest.mark.parametrize(("N", "Q"), [(5, 3), (3, 5), (40, 30)])
@pytest.mark.parametrize(("O", "I"), [(7, 5), (1023, 513)])
def test_dots_in_bfloat16_are_rounded_once(N, Q, O, I):
    G_NOI, v_QOI = torch.randn(N, O, I).bfloat16(), torch.randn(Q, O, I).bfloat16()
    wanted_NQ = torch.einsum("noi,qoi->nq", G_NOI.double(), v_QOI.double())
    assert (dots(G_NOI, v_QOI) - wanted_NQ).abs().max() < 2**-7 * wanted_NQ.abs().max()


@pytest.mark.parametrize("name", ["llama", "neox", "twice"])
def test_memory_that_units_share_changes_nothing(name, fitted):
    """Longer and shorter batches in turn, of which some wait, with the memory of the ones before them."""
    c = case(name)
    low = low_rank(c, fitted(name, seed=SEED), 64)
    layers, like, scratch = tracked_layers(c.model, c.data, c.spec), torch.empty(0, dtype=torch.float64), Scratch()
    routes = {x.name: route("rebuilt", partial(low.get, x.name), len(c.queries), like) for x in layers}
    for batch_tokens in (30, 60, 15):
        shared, own = (Score(routes, len(c.queries), False, 2, scratch=s) for s in (scratch, None))
        assert torch.equal(*(swept(c, layers, batch_tokens, consumer) for consumer in (shared, own)))


@pytest.mark.parametrize("name", ["llama", "neox", "twice"])
def test_truncation_is_that_of_the_weighted_matrix(name, fitted):
    """``Wq = S^1/2 v A^1/2`` truncated and mapped back, with square roots of the dense moments."""
    c = case(name)
    found = streamed(c, low_rank(c, fitted(name, seed=SEED), 2), "tokens")
    moments = reference.moments(pairs(name, COVARIANCE_STREAM, SEED))
    cut = [{n: truncated(v_q[n], moments.S[n], moments.A[n], 2) for n in c.names} for v_q in solved(name)]
    expected = torch.stack([torch.stack([reference.score(v_q, G) for v_q in cut]) for G in gradients(name)])
    close(found, expected, 1e-4)
    assert (expected - scores(name)).abs().max() > 1e-3 * scores(name).abs().max(), "nothing was cut"


def truncated(v_OI, S_OO, A_II, rank):
    (root_S, back_S), (root_A, back_A) = map(square_root, (S_OO, A_II))
    U, s, Vh = torch.linalg.svd(root_S @ v_OI @ root_A)
    return back_S @ (U[:, :rank] * s[:rank] @ Vh[:rank]) @ back_A


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=1e-6 * values[-1]).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


@pytest.mark.parametrize("name", CASES)
def test_token_and_layer_scores(name, fitted):
    c = case(name)
    v = full(c, fitted(name, seed=SEED))
    wanted = {row: [row % len(c.queries), len(c.queries) - 1] for row in range(0, len(c.data), 2)}
    wanted = {row: sorted(set(slots)) for row, slots in wanted.items()}
    found = rescore(c.model, c.layers, c.data, v, wanted, batch_tokens=20)
    assert sorted(zip(found.rows_P.tolist(), found.queries_P.tolist(), strict=True)) == [
        (row, q) for row, slots in wanted.items() for q in slots
    ]
    largest = scores(name).abs().max()
    for p, (row, q) in enumerate(zip(found.rows_P, found.queries_P, strict=True)):
        expected_T = reference.token_scores(solved(name)[q], pairs(name)[row])
        tokens_T = found.tokens_PT[p].double()
        assert (tokens_T[: len(expected_T)] - expected_T).abs().max() < STORED * largest
        assert not tokens_T[len(expected_T) :].any()
        by_layer = torch.stack([-(solved(name)[q][n] * gradients(name)[row][n]).sum() for n in c.names])
        assert (found.layers_PL[p] - by_layer).abs().max() < STORED * largest


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "twice", "shared"])
def test_output_token_influence(name, fitted):
    """Token by token: minus the dot product of ``v`` with the gradient of that token's loss alone."""
    c, row = case(name), max(range(len(case(name).data)), key=lambda i: case(name).data.lengths_N[i])
    v = {n: solved(name)[0][n] for n in c.names}
    found_T = output_token_influence(c.model, c.layers, c.data.batch(np.array([row])), v)[0]
    labels = c.labels(row)
    for t in range(1, len(labels)):
        only = torch.where(torch.arange(len(labels)) == t - 1, labels, -1)
        loss = reference.token_loss(torch.from_numpy(c.data.tokens[row]), only)
        expected = reference.score(v, reference.gradient(c.model.module, c.names, loss))
        assert float(found_T[t] - expected) == pytest.approx(0, abs=1e-9 * float(scores(name).abs().max()))


def test_output_token_influence_needs_a_language_model():
    c = case("classifier")
    with pytest.raises(ModelError, match="needs a language model"):
        output_token_influence(c.model, c.layers, c.data.batch(np.array([0])), solved("classifier")[0])


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same(order, fitted):
    c = case("llama")
    close(streamed(c, low_rank(c, fitted("llama", seed=SEED), 32), order), scores("llama"), STORED)


def test_chunks_of_queries_hold_what_fits():
    c = case("llama")
    assert query_chunks(c.layers, c.queries, None, budget=1) == [[q] for q in indices(c)]
    assert query_chunks(c.layers, c.queries, 4, budget=1 << 30) == [indices(c)]


def test_the_top_table_is_the_extremes_of_the_scores(fitted, tmp_path):
    c = case("llama")
    found = traced(c, fitted("llama", seed=SEED), tmp_path, top=3, layer_scores=True).numpy()
    top = pd.read_parquet(tmp_path / "top.parquet")
    for q, name in enumerate(c.queries.ids):
        order = np.argsort(-found[:, q])
        for side, ranked in (("positive", order), ("negative", order[::-1])):
            rows = top[(top["query"] == name) & (top["side"] == side)]
            best = [i for i in ranked[:3] if (found[i, q] > 0) == (side == "positive")]
            assert rows["sequence"].tolist() == best
            assert rows["rank"].tolist() == list(range(1, len(best) + 1))
            np.testing.assert_allclose(rows["score"], found[best, q], rtol=1e-5)
            np.testing.assert_allclose(rows["score_nats"], found[best, q] / len(c.data), rtol=1e-5)
    assert np.load(tmp_path / "layers.npy").shape == (*found.shape, len(c.names))


def test_spurious_is_a_score_that_few_tokens_carry():
    """The share is ``sqrt(18) / 6 = 0.707`` and ``sqrt(11) / 5 = 0.663`` in the two cases beside the limit of two thirds."""
    assert spurious(np.array([5.0, 0.1, -0.1]))
    assert spurious(np.array([4.0, -1.0, 1.0]))
    assert not spurious(np.array([3.0, -1.0, 1.0]))
    assert not spurious(np.array([1.0, -1.0, 1.0, 1.0]))
    assert not spurious(np.zeros(3))
