"""Mixtures of experts: their moments are those of all (token, expert) pairs of a block, and ``lam`` is each expert's own."""

import numpy as np
import pytest
import torch

from architectures import build
from upriver.curvature.consumers import Covariance
from upriver.model.capture import capture, frozen
from upriver.model.coverage import coverage
from upriver.model.experts import Expert, packed_rows
from upriver.model.layers import find_layers
from upriver.text.batch import Batch

N, T = 3, 10
TOKENS_NT = torch.randint(2, 300, (N, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def module():
    return build("gpt_oss")  # transposed, with a bias, gate and up by turns


def test_rows_of_an_expert_stand_by_sequence_with_their_positions():
    x_MI, at_M = torch.arange(1.0, 5)[:, None], torch.tensor([1, 2, 9, 10])
    x_NtI, at_Nt = packed_rows(x_MI, at_M, 3, 5)
    assert x_NtI[..., 0].tolist() == [[1, 2], [3, 0], [4, 0]]
    assert at_Nt.tolist() == [[1, 2], [4, -1], [0, -1]]


def test_moments_are_means_over_all_pairs_and_padding_is_no_part_of_them(module):
    layers, sums, seen = find_layers(module, "mlp"), {}, []
    real_NT = torch.ones(N, T, dtype=torch.bool)
    real_NT[1, 6:] = False
    consumer = Covariance(sums, torch.float32)
    consumer.begin(Batch(np.arange(N), np.arange(N, dtype=np.uint64), {}, real_NT))

    def consume(layer, a_NTI, g_NTO):
        consumer(layer, a_NTI, g_NTO)
        for n, row in enumerate(layer.at_NT.tolist()):
            seen.extend((layer.pool, a_NTI[n, i]) for i, t in enumerate(row) if t >= 0 and real_NT[n, t])

    with capture(module, layers, consume) as run:
        run(N, T, lambda: module(input_ids=TOKENS_NT).logits[real_NT].square().sum())
    pools = {x.pool for x in layers}
    assert len(pools) == 4
    for pool in pools:
        a_MI = torch.stack([a for name, a in seen if name == pool])
        assert int(sums[f"pairs:{pool}"]) == len(a_MI) == 2 * int(real_NT.sum())  # each token goes to two experts
        torch.testing.assert_close(sums[f"A:{pool}"].tril(), (a_MI.T @ a_MI).tril(), rtol=1e-4, atol=1e-5)
        assert sum(name.endswith(pool) for name in sums if name[0] in "AS") == 2


def test_the_model_is_left_as_it_was_and_gives_the_same(module):
    before = module.config._experts_implementation
    with torch.no_grad():
        plain = module(input_ids=TOKENS_NT).logits
        with frozen(module):
            torch.testing.assert_close(module(input_ids=TOKENS_NT).logits, plain, rtol=1e-4, atol=1e-5)
            assert module.config._experts_implementation != before
    assert module.config._experts_implementation == before


def test_some_experts_may_be_chosen_and_the_share_counts_those(module):
    (one,) = find_layers(module, "model.layers.0.mlp.experts.3.down_proj")
    assert isinstance(one.modules[0], Expert)
    found = coverage(module, [one])
    assert found.tracked == one.O * one.I
    assert found.tracked + sum(x["parameters"] for x in found.untracked) == found.total
