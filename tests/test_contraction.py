"""Contraction in float64: every order, at low and at full rank, to nine digits; costs are the multiplications written out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from upriver.influence.stages import evenly
from upriver.runtime.counts import contraction, orders

import reference
from cases import CASES, case, close, gradients, measured
from upriver.influence.score import Score, route
from upriver.model.layers import Layer
from upriver.model.sweep import sweep, tracked_layers
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
    sweep(c.model, tracked_layers(c.model, c.data, c.spec), c.data, c.data.plan(batch_tokens), consumer)

    def wanted(names) -> torch.Tensor:
        each = [[reference.score({n: dense[n][q] for n in names}, G) for q in range(3)] for G in gradients(name)]
        return torch.tensor(each, dtype=torch.float64)

    found = consumer.tensors()
    torch.testing.assert_close(consumer.exact_NQ, wanted(c.names), rtol=1e-9, atol=1e-11)
    place = torch.argsort(found["rows"])
    close(found["scores"][place], wanted(c.names), 1e-6)  # kept in float32
    for i, n in enumerate(c.names):
        close(found["layers"][place][..., i], wanted([n]), 1e-6)


def test_costs_are_the_multiplications_written_out():
    O, I, M, N, Q, R = 3, 4, 10, 2, 5, 2
    tokens = sum(M * O * R + M * I * R for _ in range(Q))  # g_t U and V a_t
    form, dots, rebuild = M * O * I, N * Q * O * I, sum(O * R * I for _ in range(Q))
    assert orders(O, I, M, N, Q, R) == (tokens, form + dots, form + dots + rebuild)


def test_one_query_goes_by_tokens_and_many_by_dense_gradients_or_rebuilt():
    wide = [Layer(n, (), 512, 512, False, 0, n) for n in "ab"]

    def chosen(**given):
        found = contraction(wide, R=32, **given)
        return set(found.orders.values()), found.hold

    assert chosen(M=512, N=1, Q=1) == ({"tokens"}, 1)
    assert chosen(M=4096, N=8, Q=200) == ({"dense"}, 1)
    waiting = 2 * 4 * 4096 * (512 + 512)  # one batch's inputs and output gradients, of both layers
    assert chosen(M=4096, N=8, Q=200, room=0) == ({"rebuilt"}, 1)
    assert chosen(M=4096, N=8, Q=200, room=3 * waiting) == ({"rebuilt"}, 3)
    assert chosen(M=4096, N=8, Q=200, room=20 * waiting - 1) == ({"dense"}, 1)
    half = 2 * 2 * 200 * 512 * 512  # in bfloat16 the queries take half
    assert chosen(M=4096, N=8, Q=200, room=half - 1)[0] == chosen(M=4096, N=8, Q=200, room=half)[0] == {"rebuilt"}
    assert chosen(M=4096, N=8, Q=200, room=half, number=2) == ({"dense"}, 1)
    assert chosen(M=4096, N=8, Q=200, room=half - 1, number=2)[0] == {"rebuilt"}
    whole = contraction(wide, M=4096, N=8, Q=200, R=None)
    assert set(whole.orders.values()) == {"dense"}


def test_bytes_that_stay_through_a_scan():
    """Counted one by one: queries laid out, the largest of those that are read again, and what waits."""
    layers = [Layer(n, (), O, I, False, 0, n) for n, O, I in (("up", 512, 2048), ("down", 1024, 512))]
    given = {"M": 512.0, "N": 2, "R": 32}
    up, down, whole = 4 * 32 * (512 + 2048), 4 * 32 * (1024 + 512), 4 * (512 * 2048 + 1024 * 512)  # of one query
    waiting = 4 * 512 * (512 + 2048 + 1024 + 512)
    assert contraction(layers, Q=200, room=0, **given).held == 2 * 200 * up
    assert contraction(layers, Q=200, room=0, at_hand=True, **given).held == 200 * (up + up + down)
    assert contraction(layers, Q=200, room=3 * waiting, **given)[1:] == (3, 2 * 200 * up + 3 * waiting)
    assert contraction(layers, Q=200, room=200 * whole, **given).held == 200 * whole
    assert contraction(layers, Q=200, **given | {"R": None}).held == 200 * whole
    assert contraction(layers, Q=1, **given).held == up + down


def test_waiting_batches_take_three_quarters_of_a_gigabyte_or_as_queries_ask():
    layers = [Layer(n, (), 1024, 1024, False, 0, n) for n in "abcdefgh"]

    def holds(*many, number=4):
        return [contraction(layers, M=2048, N=8, Q=Q, R=32, room=1 << 32, number=number).hold for Q in many]

    # a batch is 128 MiB, and 64 queries are as much: of them half as much again waits
    assert holds(200, 400, 800) == [6, 9, 18]
    # half the bytes a batch, of queries that are read in float32 as before
    assert holds(384, 448, 832, number=2) == [18, 21, 39]


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
        score.begin(SimpleNamespace(rows_N=rows))
        score(layer, a[rows], g[rows])
    score.tensors()
    expected = torch.einsum("qoi,ntoi->nq", low.dense(), torch.einsum("nto,nti->ntoi", g, a))
    torch.testing.assert_close(score.exact_NQ, -expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("hold", "batches", "even"), [(1, 5, 1), (5, 8, 4), (8, 8, 8), (20, 8, 8), (3, 8, 3), (6, 32, 6)]
)
def test_batches_wait_in_even_numbers_and_no_more_often(hold, batches, even):
    assert evenly(hold, batches) == even
    assert -(-batches // even) == -(-batches // hold)
