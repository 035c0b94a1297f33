"""Scores on the disk: what is gathered, ranked and written in pieces is what it would be in one piece."""

import os
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import NumericalError
from upriver.influence import results, scanned
from upriver.influence.scanned import Scan, Scanned, Table, extremes, gather, random_rows, scores_of
from upriver.runtime.artifact import Artifact
from upriver.text.batch import Examples
from upriver.text.corpus import Corpus

IDS = ["a", "b", "c", "d", "e"]
N, Q, L = 97, len(IDS), 3


@pytest.fixture(params=[1, 80, 1 << 20], ids=["row by row", "four rows", "at once"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(scanned, "CHUNK_BYTES", request.param)


def on_disk(folder, rows_N, scores_NQ, layers_NQL=None) -> Scanned:
    """The arrays as a scan of one unit leaves them."""
    stage = Artifact.open(folder, "scan", {})
    part = {"rows": torch.from_numpy(rows_N), "scores": torch.from_numpy(scores_NQ)}
    stage.commit(0, part if layers_NQL is None else part | {"layers": torch.from_numpy(layers_NQL)})
    whole = Scan(stage, 1, slice(0, scores_NQ.shape[1]))
    return gather([whole], rows_N, None if layers_NQL is None else layers_NQL.shape[2])


def tied(rng, n=N, q=Q) -> np.ndarray:
    """Scores among which many are equal."""
    return rng.integers(-4, 5, (n, q)).astype(np.float32)


@pytest.mark.parametrize("shape", [(11, 4), (11, 4, 3), (11, 1)])
def test_a_table_is_an_array_that_numpy_reads(shape, tmp_path):
    rng = np.random.default_rng(0)
    expected, table = np.zeros(shape, np.float32), Table.create(tmp_path / "t.npy", shape)
    for _ in range(20):
        at = np.sort(rng.choice(len(expected), 5, replace=False))
        columns = slice(0, shape[1]) if rng.random() < 0.5 else slice(shape[1] // 2, shape[1])
        values = rng.standard_normal((5, *expected[0, columns].shape)).astype(np.float32)
        expected[at, columns] = values
        table.write(at, columns, values)
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), expected)
    np.testing.assert_array_equal(table[2:7], expected[2:7])
    np.testing.assert_array_equal(table[9:99], expected[9:99])
    at = rng.integers(0, len(expected), 30)
    np.testing.assert_array_equal(table[at], expected[at])
    assert table[at[:0]].shape == (0, *shape[1:])


def test_units_of_several_passes_are_put_in_the_order_of_the_corpus(tmp_path):
    rng = np.random.default_rng(1)
    rows_N = np.sort(rng.choice(1000, N, replace=False))
    layers_NQL = rng.standard_normal((N, Q, L)).astype(np.float32)
    scores_NQ, passes = layers_NQL.sum(2), []
    for number, queries in enumerate((slice(0, 2), slice(2, 3), slice(3, Q))):
        stage = Artifact.open(tmp_path / f"scan-{number}", "scan", {})
        units = np.array_split(rng.permutation(N), 1 + 3 * number)
        for unit, at in enumerate(units):
            part = {"rows": rows_N[at], "scores": scores_NQ[at][:, queries], "layers": layers_NQL[at][:, queries]}
            stage.commit(unit, {name: torch.from_numpy(value) for name, value in part.items()})
        passes.append(Scan(stage, len(units), queries))
    found = gather(passes, rows_N, L)
    assert found.layers_NQL is not None
    np.testing.assert_array_equal(found.scores_NQ[:N], scores_NQ)
    np.testing.assert_array_equal(found.layers_NQL[:N], layers_NQL)
    np.testing.assert_array_equal(scores_of(found, rows_N[[5, 3, 3]]), scores_NQ[[5, 3, 3]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_counted_and_leave_no_table(bad, tmp_path):
    scores_NQ = np.zeros((N, Q), np.float32)
    scores_NQ[[3, 3, 50], [0, 1, 4]] = bad
    with pytest.raises(NumericalError, match=rf"2 of {N} sequences got a score that is NaN or infinite"):
        on_disk(tmp_path, np.arange(N), scores_NQ)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["key.json", "unit-000000.safetensors"]


def test_a_gathering_that_is_cut_off_is_begun_again(tmp_path, monkeypatch):
    scores_NQ = np.random.default_rng(2).standard_normal((N, Q)).astype(np.float32)

    def dies(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            on_disk(tmp_path, np.arange(N), scores_NQ)
    assert not list(tmp_path.glob("*.npy"))
    np.testing.assert_array_equal(on_disk(tmp_path, np.arange(N), scores_NQ).scores_NQ[:N], scores_NQ)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("top", [1, 7, N - 1, N, 1000])
def test_extremes_are_the_ends_of_a_stable_sort(top, tmp_path):
    rng = np.random.default_rng(top)
    rows_N, scores_NQ = np.sort(rng.choice(1000, N, replace=False)), tied(rng)
    scores_NQ[:, 1] = 0  # nothing but ties
    scores_NQ[:, 2] = np.arange(N)
    scores_NQ[:, 3] = -np.arange(N)
    found, k = extremes(on_disk(tmp_path, rows_N, scores_NQ), top), min(top, N)
    for q in range(Q):
        order = np.argsort(-scores_NQ[:, q], kind="stable")
        np.testing.assert_array_equal(found[q], np.sort(rows_N[np.unique([*order[:k], *order[-k:]])]))


def test_random_rows_are_scanned_ones_and_depend_on_the_seed_alone(tmp_path):
    rows_N = np.arange(0, 3 * N, 3)
    found = on_disk(tmp_path, rows_N, np.zeros((N, Q), np.float32))
    drawn = random_rows(found, 5)
    assert len(set(drawn)) == scanned.SAMPLE
    assert set(drawn) <= set(rows_N)
    np.testing.assert_array_equal(drawn, random_rows(found, 5))
    assert set(drawn) != set(random_rows(found, 6))


def corpus(folder) -> Corpus:
    """Documents of one to many windows."""
    texts = ["we the people " * (1 + 7 * n % 12) for n in range(20)]
    path = write_jsonl(folder / "c.jsonl", [{"id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    return Corpus.read(path, byte_tokenizer(), seq_len=8, cache=folder)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_tables_are_those_of_pandas_in_one_piece(share, tmp_path):
    data, rng = corpus(tmp_path), np.random.default_rng(3)
    rows_N = np.sort(rng.choice(len(data), int(share * len(data)), replace=False))
    scores_NQ = rng.standard_normal((len(rows_N), Q)).astype(np.float32)
    results.write_scores(tmp_path, data, IDS, on_disk(tmp_path / "scan", rows_N, scores_NQ))
    names = [data.document_id(int(d)) for d in data.document_of_N[rows_N]]
    places = pd.DataFrame({"sequence": rows_N, "document": names})
    places[["start", "end"]] = data.span_N2[rows_N]
    scores = pd.DataFrame(scores_NQ, columns=pd.Index(IDS))
    number_N, order = pd.factorize(places["document"])
    sums_DQ = np.zeros((len(order), Q))
    np.add.at(sums_DQ, number_N, scores_NQ)
    documents = pd.DataFrame({"document": order, "sequences": np.bincount(number_N)})
    sums = pd.DataFrame(sums_DQ.astype(np.float32), columns=pd.Index(IDS))
    same_table(tmp_path / "scores.parquet", pd.concat([places, scores], axis=1))
    same_table(tmp_path / "documents.parquet", pd.concat([documents, sums], axis=1))


def same_table(path, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(pd.read_parquet(path), expected)
    assert pq.read_schema(path).equals(pa.Table.from_pandas(expected, preserve_index=False).schema, check_metadata=True)


def test_an_example_is_a_document_of_its_own(tmp_path):
    data, scores_NQ = Examples({"x": torch.arange(N)}), tied(np.random.default_rng(4))
    results.write_scores(tmp_path, data, IDS, on_disk(tmp_path / "scan", np.arange(N), scores_NQ))
    for name in ("scores", "documents"):
        table = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert table["document"].tolist() == [str(n) for n in range(N)]
        np.testing.assert_array_equal(table[IDS].to_numpy(), scores_NQ)


@pytest.mark.parametrize("links", [True, False])
def test_scores_by_layer_are_published_without_being_read(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *given: (_ for _ in ()).throw(OSError("no links here")))
    layers_NQL = np.random.default_rng(5).standard_normal((N, Q, L)).astype(np.float32)
    found = on_disk(tmp_path / "scan", np.arange(N), layers_NQL.sum(2), layers_NQL)
    monkeypatch.setattr(Table, "_read", lambda *given: pytest.fail("read"))
    assert found.layers_NQL is not None
    scanned.publish(found.layers_NQL, tmp_path / "layers.npy")
    found.layers_NQL.path.unlink()
    np.testing.assert_array_equal(np.load(tmp_path / "layers.npy"), layers_NQL)


def test_memory_does_not_grow_with_the_sequences(tmp_path, monkeypatch):
    """Peak memory of ranking and writing, Python and numpy, for tables of 4 and of 16 chunks."""
    monkeypatch.setattr(scanned, "CHUNK_BYTES", 1 << 20)

    def peak(n: int) -> int:
        folder = tmp_path / str(n)
        folder.mkdir()
        table = Table.create(folder / "scores.npy", (n, 64))
        table.write(np.arange(n), slice(0, 64), np.random.default_rng(n).standard_normal((n, 64)).astype(np.float32))
        found, data = Scanned(np.arange(n), table, None), Examples({"x": torch.zeros(n)}, np.zeros(n, np.uint64))
        pa.default_memory_pool().release_unused()
        tracemalloc.start()
        extremes(found, 10)
        results.write_scores(folder, data, [str(q) for q in range(64)], found)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return traced

    few, many = peak(4 * 4096), peak(16 * 4096)
    assert many < 1.05 * few
