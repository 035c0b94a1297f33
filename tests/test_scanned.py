"""Scores on the disk: what is read, ranked and written unit by unit is what it would be in one piece."""

import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from test_resume import GIVEN, tiny_corpus, tiny_model, tiny_queries
from text_cases import byte_tokenizer, write_jsonl
from upriver.curvature.fit import fit
from upriver.errors import NumericalError
from upriver.influence import results
from upriver.influence.queries import Measurements
from upriver.influence.scan import SAMPLE, Part, Scanned
from upriver.model.load import Model
from upriver.model.tasks import Regression
from upriver.pipeline import trace
from upriver.runtime.artifact import Artifact
from upriver.text.corpus import Corpus
from upriver.text.examples import Examples

IDS = ["a", "b", "c", "d", "e"]
N, Q, L = 97, len(IDS), 3
UNITS = pytest.mark.parametrize("units", [1, 4, N])


def on_disk(folder, rows_N, scores_NQ, layers_NQL=None, units=4, groups=1) -> Scanned:
    """The arrays as a scan leaves them: in units of consecutive rows, each group of layers by itself."""
    places, parts, layers = np.array_split(np.arange(len(rows_N)), units), [], None
    for number in range(groups):
        stage = Artifact.open(folder / f"group-{number}", "scan", {})
        layers = layers_NQL.shape[2] if layers_NQL is not None else None
        mine = slice(number, number + 1) if groups > 1 else slice(0, layers)
        for unit, at in enumerate(places):
            scores = scores_NQ[at] if groups == 1 else layers_NQL[at, :, mine].sum(2)
            held = {"scores": torch.from_numpy(scores)}
            stage.commit(unit, held | ({"layers": torch.from_numpy(layers_NQL[at, :, mine])} if layers else {}))
        parts.append(Part([stage.unit_path(unit) for unit in range(units)], mine))
    return Scanned([rows_N[at] for at in places], parts, scores_NQ.shape[1], layers)


def test_groups_of_layers_add_up(tmp_path):
    rng = np.random.default_rng(1)
    rows_N = np.sort(rng.choice(1000, N, replace=False))
    layers_NQL = rng.standard_normal((N, Q, L)).astype(np.float32)
    found = on_disk(tmp_path, rows_N, layers_NQL.sum(2), layers_NQL, groups=L)
    np.testing.assert_array_equal(found.rows_N, rows_N)
    scores_NQ = np.concatenate([scores for _, scores in found.chunks()])
    np.testing.assert_allclose(scores_NQ, layers_NQL.sum(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([found.by_layer(unit) for unit in range(4)]), layers_NQL)
    np.testing.assert_array_equal(found.of(rows_N[[5, 96, 3, 3]]), scores_NQ[[5, 96, 3, 3]])


@UNITS
@pytest.mark.parametrize("top", [1, 7, N - 1, N, 1000])
def test_extremes_are_the_ends_of_a_stable_sort(top, units, tmp_path):
    rng = np.random.default_rng(top)
    rows_N, scores_NQ = np.sort(rng.choice(1000, N, replace=False)), rng.integers(-4, 5, (N, Q)).astype(np.float32)
    scores_NQ[:, 1] = 0  # nothing but ties
    scores_NQ[:, 2] = np.arange(N)
    scores_NQ[:, 3] = -np.arange(N)
    found, k = on_disk(tmp_path, rows_N, scores_NQ, units=units).extremes(top, Q), min(top, N)
    for q in range(Q):
        order = np.argsort(-scores_NQ[:, q], kind="stable")
        np.testing.assert_array_equal(found[q], np.sort(rows_N[np.unique([*order[:k], *order[-k:]])]))


def test_random_rows_are_scanned_ones_and_depend_on_the_seed_alone(tmp_path):
    rows_N = np.arange(0, 3 * N, 3)
    found = on_disk(tmp_path, rows_N, np.zeros((N, Q), np.float32))
    drawn = found.random_rows(5)
    assert len(set(drawn)) == SAMPLE
    assert set(drawn) <= set(rows_N)
    np.testing.assert_array_equal(drawn, on_disk(tmp_path, rows_N, np.zeros((N, Q), np.float32)).random_rows(5))
    assert set(drawn) != set(found.random_rows(6))


def corpus(folder) -> Corpus:
    """Documents of one to many windows."""
    texts = ["we the people " * (1 + 7 * n % 12) for n in range(20)]
    path = write_jsonl(folder / "c.jsonl", [{"id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    return Corpus.read(path, byte_tokenizer(), seq_len=8, cache=folder)


@UNITS
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_tables_are_those_of_pandas_in_one_piece(share, units, tmp_path):
    data, rng = corpus(tmp_path), np.random.default_rng(3)
    rows_N = np.sort(rng.choice(len(data), int(share * len(data)), replace=False))
    layers_NQL = rng.standard_normal((len(rows_N), Q, L)).astype(np.float32)
    scores_NQ = layers_NQL.sum(2)
    found = on_disk(tmp_path / "scan", rows_N, scores_NQ, layers_NQL, min(units, len(rows_N)))
    results.write_scores(tmp_path, data, IDS, found)
    names = [data.document_id(int(d)) for d in data.document_of_N[rows_N]]
    places = pd.DataFrame({"sequence": rows_N, "document": names, "part": 0})
    places[["start", "end"]] = data.span_N2[rows_N]
    scores = pd.DataFrame(scores_NQ, columns=pd.Index(IDS))
    number_N, order = pd.factorize(places["document"])
    sums_DQ = np.zeros((len(order), Q))
    np.add.at(sums_DQ, number_N, scores_NQ)
    documents = pd.DataFrame({"document": order, "sequences": np.bincount(number_N)})
    sums = pd.DataFrame(sums_DQ.astype(np.float32), columns=pd.Index(IDS))
    same_table(tmp_path / "scores.parquet", pd.concat([places, scores], axis=1))
    same_table(tmp_path / "documents.parquet", pd.concat([documents, sums], axis=1))
    np.testing.assert_array_equal(np.load(tmp_path / "layers.npy"), layers_NQL)


def same_table(path, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(pd.read_parquet(path), expected)
    assert pq.read_schema(path).equals(pa.Table.from_pandas(expected, preserve_index=False).schema, check_metadata=True)


def test_an_example_is_a_document_of_its_own(tmp_path):
    data, scores_NQ = Examples({"x": torch.arange(N)}), np.random.default_rng(4).random((N, Q)).astype(np.float32)
    results.write_scores(tmp_path, data, IDS, on_disk(tmp_path / "scan", np.arange(N), scores_NQ))
    for name in ("scores", "documents"):
        table = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert table["document"].tolist() == [str(n) for n in range(N)]
        np.testing.assert_array_equal(table[IDS].to_numpy(), scores_NQ)


def test_memory_does_not_grow_with_the_sequences(tmp_path):
    """Peak memory of ranking and writing, Python and numpy, where the groups of rows that are written are full."""

    def peak(units: int) -> int:
        n, folder = 4096 * units, tmp_path / str(units)
        scores_NQ = np.random.default_rng(n).standard_normal((n, 64)).astype(np.float32)
        found = on_disk(folder, np.arange(n), scores_NQ, units=units)
        data = Examples({"x": torch.zeros(n)}, np.zeros(n, np.uint64))
        pa.default_memory_pool().release_unused()
        tracemalloc.start()
        found.extremes(10, 64)
        results.write_scores(folder, data, [str(q) for q in range(64)], found)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return traced

    few, many = peak(10), peak(30)
    assert many < 1.05 * few


@pytest.mark.parametrize("by_layer", [True, False])
def test_units_of_a_scan_change_no_score(by_layer, tmp_path):
    model, corpus = tiny_model(), tiny_corpus()
    factors = fit(model, corpus, tmp_path / "factors", **GIVEN)
    given = {"rank": 4, "top": 3, "layer_scores": by_layer, "batch_tokens": 13, "held_out": 0}
    for name, unit_tokens in (("whole", 10**6), ("parts", 20)):
        trace(model, corpus, tiny_queries(), factors, tmp_path / name, unit_tokens=unit_tokens, **given)
    whole, parts = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("whole", "parts"))
    ids = tiny_queries().ids
    pd.testing.assert_frame_equal(whole, parts, rtol=1e-4, atol=1e-5 * float(whole[ids].abs().max().max()))
    if by_layer:
        one, other = (np.load(tmp_path / name / "layers.npy") for name in ("whole", "parts"))
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(one).max()))


def test_scores_that_are_not_finite_are_an_error_and_leave_no_unit(tmp_path):
    """Losses and gradients of the two large examples are finite numbers, their products are not."""
    x, y = torch.ones(N, 3), torch.zeros(N, 1)
    x[[4, 50]] = 1e12
    torch.manual_seed(0)
    model = Model(torch.nn.Linear(3, 1), task=Regression())
    asked = Measurements(Examples({"x": x[4:5], "y": y[4:5]}))
    with pytest.raises(NumericalError, match="sequences got a score that is NaN or infinite"):
        trace(model, Examples({"x": x, "y": y}), asked, None, tmp_path, curvature="identity", layers="*", held_out=0)
    assert not list(tmp_path.glob("scan/*/unit-*"))
