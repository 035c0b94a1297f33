"""Contraction in float64: every order, at low and at full rank, to nine digits; costs are the multiplications written out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reference
from cases import CASES, case, close, gradients, measured
from upriver.influence.score import Score, route
from upriver.model.check import tracked_layers
from upriver.model.layers import Layer
from upriver.model.sweep import Source, sweep
from upriver.runtime.cost import Asked, contraction, orders
from upriver.tensors import LowRank


class Contractions(Score):
    """Consumer: also the scores of one order in float64 ``[N, Q]`` by corpus row; two batches wait, rows come one by one."""

    def __init__(self, order, solved: dict[str, LowRank | torch.Tensor], N: int, Q: int):
        like = torch.empty(0, dtype=torch.float64)
        super().__init__(
            {n: route(order, lambda v=v: v, Q, like) for n, v in solved.items()}, Q, True, hold=2, rebuild_bytes=1
        )
        self.exact_NQ = torch.zeros(N, Q, dtype=torch.float64)

    def _add(self, batch, name, products_NQ) -> None:
        super()._add(batch, name, products_NQ)
        self.exact_NQ[torch.from_numpy(self.rows[batch])] -= products_NQ


@pytest.mark.parametrize("batch_tokens", [1, 1000], ids=["alone", "padded"])
@pytest.mark.parametrize("order", ["tokens", "dense", "rebuilt", "full"])
@pytest.mark.parametrize("name", CASES)
def test_every_order_gives_the_scores_of_the_oracle(name, order, batch_tokens):
    """The queries here are the measurements' own gradients, whole or as factors of rank 2."""
    c, generator = case(name), torch.Generator().manual_seed(0)
    if order == "full":
        held = {n: torch.stack([f[n] for f in measured(name)]) for n in c.names}
        dense = held
    else:
        shapes = {n: f.shape for n, f in measured(name)[0].items()}
        held = {n: LowRank(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, O, 2), (3, 2, I))))
                for n, (O, I) in shapes.items()}  # fmt: skip
        dense = {n: low.dense() for n, low in held.items()}
    consumer = Contractions(order, held, len(c.data), 3)
    source = Source.of(c.data, np.arange(len(c.data)), batch_tokens)
    sweep(c.model, tracked_layers(c.model, c.data, c.spec), source, source.rows, consumer)

    def wanted(names) -> torch.Tensor:
        each = [[reference.score({n: dense[n][q] for n in names}, G) for q in range(3)] for G in gradients(name)]
        return torch.tensor(each, dtype=torch.float64)

    found = consumer.result()
    torch.testing.assert_close(consumer.exact_NQ, wanted(c.names), rtol=1e-9, atol=1e-11)
    close(found["scores"], wanted(c.names), 1e-6)  # kept in float32
    for i, n in enumerate(c.names):
        close(found["layers"][..., i], wanted([n]), 1e-6)


def test_costs_are_the_multiplications_written_out():
    O, I, M, N, Q, R = 3, 4, 10, 2, 5, 2
    tokens = sum(M * O * R + M * I * R for _ in range(Q))  # g_t U and V a_t
    form, dots, rebuild = M * O * I, N * Q * O * I, sum(O * R * I for _ in range(Q))
    assert orders(O, I, M, N, Q, R) == (tokens, form + dots, form + dots + rebuild)


def test_one_query_goes_by_tokens_and_many_by_dense_gradients_or_rebuilt():
    wide = [Layer(n, (), 512, 512, False, 0, n) for n in "ab"]

    def chosen(M, N, Q, **given):
        found = contraction(wide, M, N, Asked(Q, 1, 32), **given)
        return set(found.orders.values()), found.hold

    assert chosen(512, 1, 1) == ({"tokens"}, 1)
    assert chosen(4096, 8, 200) == ({"dense"}, 1)
    assert chosen(4096, 8, 200, room=0) == ({"rebuilt"}, 1)
    waiting = 2 * 4 * 4096 * (512 + 512)  # one batch's inputs and output gradients, of both layers
    read = 2 * 4 * 200 * 32 * (512 + 512)  # two copies of a layer's queries
    assert chosen(4096, 8, 200, room=read + 3 * waiting) == ({"rebuilt"}, 3)
    whole = 2 * 4 * 200 * 512 * 512
    assert chosen(4096, 8, 200, room=whole) == ({"dense"}, 1)
    assert chosen(4096, 8, 200, room=whole - 1)[0] == {"rebuilt"}
    assert chosen(4096, 8, 200, room=whole / 2, number=2) == ({"dense"}, 1)  # in bfloat16 the queries take half
    assert set(contraction(wide, 4096, 8, Asked(200, 1, None)).orders.values()) == {"dense"}


def test_bytes_that_stay_through_a_scan():
    """Counted one by one: queries laid out, the largest of those that are read again, and what waits."""
    layers = [Layer(n, (), O, I, False, 0, n) for n, O, I in (("up", 512, 2048), ("down", 1024, 512))]
    up, down, whole = 4 * 32 * (512 + 2048), 4 * 32 * (1024 + 512), 4 * (512 * 2048 + 1024 * 512)  # of one query
    waiting = 4 * 512 * (512 + 2048 + 1024 + 512)

    def held(Q, R=32, **given):
        return contraction(layers, 512.0, 2, Asked(Q, 1, R), **given)

    assert held(200, room=0).held == 2 * 200 * up
    assert held(200, room=0, at_hand=True).held == 200 * (2 * up + up + down)
    assert held(200, room=2 * 200 * up + 3 * waiting)[1:] == (3, 2 * 200 * up + 3 * waiting)
    assert held(100, room=100 * whole).held <= 100 * whole
    assert held(200, R=None).held == 200 * whole
    assert held(1).held == up + down


def test_queries_that_do_not_fit_as_they_go_by_tokens_are_read_again_instead():
    layers = [Layer(n, (), 512, 512, False, 0, n) for n in "abcdefgh"]
    asked, one = Asked(4, 1, 32), 4 * 4 * 32 * (512 + 512)
    assert set(contraction(layers, 256.0, 64, asked, room=100 * one).orders.values()) == {"tokens"}
    tight = contraction(layers, 256.0, 64, asked, room=3 * one)
    assert set(tight.orders.values()) == {"rebuilt"}
    assert tight.held <= 3 * one


def test_rebuilt_queries_are_read_for_each_wait_and_not_held():
    reads = []
    low = LowRank(torch.randn(3, 4, 2), torch.randn(3, 2, 5))
    found = route("rebuilt", lambda: reads.append(0) or low, 3, torch.empty(0))
    assert not reads
    for _ in range(2):
        assert torch.equal(found.low().dense(), low.dense())
    assert len(reads) == 2


@pytest.mark.parametrize("hold", [1, 2])
@pytest.mark.parametrize(("O", "I"), [(130, 37), (37, 130), (64, 64), (33, 1), (1000, 16)])
def test_rebuilt_by_halves_is_the_written_out_sum(O, I, hold):
    """Sides that no block divides, either one the larger."""
    low = LowRank(torch.randn(5, O, 3, dtype=torch.float64), torch.randn(5, 3, I, dtype=torch.float64))
    a, g = torch.randn(4, 7, I, dtype=torch.float64), torch.randn(4, 7, O, dtype=torch.float64)
    layer, like = Layer("x", (), O, I, False, 0, "x"), a[:0]
    score = Contractions("rebuilt", {"x": low}, 4, 5)
    score.hold, score.routes["x"] = hold, route("rebuilt", lambda: low, 5, like)
    for rows in (np.array([0, 1]), np.array([2, 3])):
        score.begin(SimpleNamespace(rows_N=rows, device=like.device))
        score(layer, a[rows], g[rows])
    score.result()
    expected = torch.einsum("qoi,ntoi->nq", low.dense(), torch.einsum("nto,nti->ntoi", g, a))
    torch.testing.assert_close(score.exact_NQ, -expected, rtol=1e-12, atol=1e-12)
