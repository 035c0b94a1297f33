"""Batches: each row once, within the budget, independent of place; keys that follow the content."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upriver.errors import CorpusError
from upriver.text.batch import Batch, Sequences, pad, plan, sequence_keys
from upriver.text.examples import Examples

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=50).map(lambda values: np.array(values, np.int32))


class Lengths(Sequences):
    """Sequences of which nothing but the lengths is known."""

    def __init__(self, lengths_N: np.ndarray):
        self.lengths_N, self.keys_N = lengths_N, sequence_keys(np.arange(len(lengths_N), dtype=np.uint64))

    def batch(self, rows: np.ndarray) -> Batch:
        raise NotImplementedError


@given(lengths, st.integers(1, 100))
def test_a_plan_holds_each_row_once_within_the_budget(lengths_N, batch_tokens):
    batches = plan(lengths_N, batch_tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths_N)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths_N[rows].max() <= batch_tokens
    in_order = lengths_N[np.concatenate(batches)]
    assert (np.diff(in_order) <= 0).all()


@given(lengths, st.data())
def test_a_plan_of_some_rows_holds_these(lengths_N, data):
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths_N) - 1), unique=True)), np.int64)
    assert sorted(int(row) for batch in plan(lengths_N, 64, rows) for row in batch) == sorted(rows.tolist())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_keys_are_distinct_and_follow_the_content(contents, random):
    hashes = np.array(contents, np.uint64)
    keys = sequence_keys(hashes)
    order = random.sample(range(len(contents)), len(contents))
    assert len(set(keys.tolist())) == len(contents)
    for content in set(contents):
        assert set(keys[hashes == content].tolist()) == set(
            sequence_keys(hashes[order])[hashes[order] == content].tolist()
        )


@given(lengths, st.integers(1, 500), st.integers(0, 3))
def test_a_sample_keeps_to_its_budget(lengths_N, max_tokens, seed):
    rows = Lengths(lengths_N).sample(max_tokens, seed)
    assert len(rows) == 1 or lengths_N[rows].sum() <= max_tokens
    assert len(set(rows.tolist())) == len(rows) > 0
    if lengths_N.sum() <= max_tokens:
        assert len(rows) == len(lengths_N)


def test_samples_differ_by_seed():
    assert len({tuple(Lengths(np.ones(100, np.int32)).sample(10, seed)) for seed in range(10)}) == 10


def test_padding_is_on_the_right_and_never_has_loss():
    tokens = [np.array([5, 6, 7]), np.array([8])]
    batch = pad(np.array([3, 1]), np.array([1, 2], np.uint64), tokens, [np.ones(3, bool), np.ones(1, bool)])
    assert batch.inputs["tokens"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.inputs["loss"].tolist() == [[False, True, True], [False, False, False]]
    assert batch.real_NT is not None
    assert int(batch.real_NT.sum()) == 4
    assert batch.to("cpu").rows_N.tolist() == [3, 1]


def test_examples_are_a_corpus_of_single_positions():
    inputs = {"x": torch.arange(12.0).reshape(6, 2), "label": torch.tensor([0, 1, 0, 1, 0, 1])}
    examples = Examples(inputs)
    assert len(examples) == 6
    assert [len(rows) for rows in examples.plan(4)] == [4, 2]
    batch = examples.batch(np.array([4, 0]))
    assert batch.inputs["x"].tolist() == [[8.0, 9.0], [0.0, 1.0]]
    assert batch.real_NT is None
    assert len(batch.rows_N) == 2
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    permuted = Examples({name: tensor[order] for name, tensor in inputs.items()})
    assert (permuted.keys_N == examples.keys_N[order.numpy()]).all()


def test_the_fingerprint_of_examples_is_that_of_their_content():
    x, labels = torch.randn(4, 3).to(torch.bfloat16), torch.tensor([True, False, True, True])
    same, other = Examples({"x": x, "y": labels}), Examples({"x": x, "y": ~labels})
    assert Examples({"y": labels, "x": x.clone()}).fingerprint == same.fingerprint != other.fingerprint
    assert Examples({"x": x, "y": labels}, keys=np.arange(4)).fingerprint != same.fingerprint


def test_examples_stay_what_their_fingerprint_says():
    x = torch.randn(4, 3)
    examples, before = Examples({"x": x}), x.clone()
    x[0] = 7
    assert torch.equal(examples.batch(np.arange(4)).inputs["x"], before)


@pytest.mark.parametrize("inputs", [{"x": torch.zeros(0, 2)}, {"x": torch.zeros(2), "y": torch.zeros(3)}])
def test_examples_that_do_not_fit_together(inputs):
    with pytest.raises(CorpusError, match="one and the same length"):
        Examples(inputs)


def test_keys_that_do_not_fit_the_examples():
    with pytest.raises(CorpusError, match="one key per example"):
        Examples({"x": torch.zeros(3)}, keys=np.arange(2))


def places_of(batch):
    return batch.predicted().at_M.tolist(), batch.real(batch.inputs["tokens"][..., None], "x")[1]


def test_what_is_known_of_masks_is_not_told_of_others():
    real_NT = torch.tensor([[True, True, True], [True, True, False]])
    tokens_NT, keys = torch.arange(6).view(2, 3), np.arange(2, dtype=np.uint64)
    batch = Batch(np.arange(2), keys, {"tokens": tokens_NT, "loss": real_NT}, real_NT).to("cpu")
    assert places_of(batch) == ([1, 2, 4], [3, 2]), "one mask for both: nothing is predicted at position 0"
    less = dataclasses.replace(batch, inputs=batch.inputs | {"loss": torch.tensor([[False, True, False]] * 2)})
    assert places_of(less) == ([1, 4], [3, 2]), "an input is replaced"
    batch.inputs["loss"][0, 1] = False
    assert places_of(batch) == ([2, 4], [2, 2]), "and written over"
