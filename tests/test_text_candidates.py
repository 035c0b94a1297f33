"""The TF-IDF filter agrees with its formula, and with bm25s, in whatever chunks the corpus is read."""

import math

import bm25s
import numpy as np
import pytest

from text_cases import LINES, byte_tokenizer, write_jsonl
from upriver.text.candidates import CHUNK_ROWS, Best, Tfidf, candidates, tfidf_ranks
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries

TOKENIZER = byte_tokenizer(bos=True)
TEXTS = [*LINES, "war war war", "xyzzy 日本", "the states", "we", "zzz"]
QUERIES = [
    {"id": "a", "prompt": "the war of the", "completion": " union"},
    {"id": "b", "prompt": "QQ", "completion": "QQQ"},
    {"id": "c", "prompt": "xyzzy", "completion": " 日", "contrast": " people"},
]


@pytest.fixture
def corpus(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in TEXTS])
    return Corpus.read(path, TOKENIZER, cache=tmp_path)


in_chunks = pytest.mark.parametrize("chunk_rows", [1, 3, CHUNK_ROWS])


def tfidf_scores(corpus, queries, chunk_rows=CHUNK_ROWS):
    """The scores of all sequences in one piece, ``[Q, N]``."""
    rows, scores = zip(*Tfidf(corpus, queries, chunk_rows).scores(), strict=True)
    assert np.concatenate(rows).tolist() == list(range(len(corpus)))
    return np.concatenate(scores, axis=1)


def written_out(corpus, tokens):
    """Equations 28 and 29, term by term."""
    held = [set(corpus.token_ids(row).tolist()) for row in range(len(corpus))]
    scores = np.zeros(len(corpus))
    for token in tokens:
        n = sum(token in tokens_of_row for tokens_of_row in held)
        for row, tokens_of_row in enumerate(held):
            if token in tokens_of_row:
                scores[row] += math.log((len(corpus) - n + 0.5) / (n + 0.5) + 1)
    return scores


@in_chunks
def test_scores_are_those_of_the_formula(corpus, chunk_rows):
    queries = Queries.of(QUERIES, TOKENIZER)
    scores = tfidf_scores(corpus, queries, chunk_rows)
    assert scores.shape == (3, len(corpus))
    assert scores.dtype == np.float32
    for q in range(3):
        np.testing.assert_allclose(scores[q], written_out(corpus, queries.token_ids(q)), rtol=1e-6)
    assert (scores[1] == 0).all()


def test_queries_that_share_nothing_with_the_corpus(corpus):
    assert (tfidf_scores(corpus, Queries.of(QUERIES[1:2], TOKENIZER)) == 0).all()


@in_chunks
def test_scores_are_those_of_bm25s_bit_for_bit(corpus, chunk_rows):
    queries = Queries.of(QUERIES, TOKENIZER)
    held = [np.unique(corpus.token_ids(row)).tolist() for row in range(len(corpus))]
    retriever = bm25s.BM25(k1=0, b=0, method="lucene")
    size = TOKENIZER.vocab_size + 1
    retriever.index((held, {token: token for token in range(size)}), create_empty_token=False, show_progress=False)
    for q, scores in enumerate(tfidf_scores(corpus, queries, chunk_rows)):
        np.testing.assert_array_equal(scores, retriever.get_scores_from_ids(queries.token_ids(q).tolist()))


@in_chunks
def test_ranks_count_the_larger_scores(corpus, chunk_rows):
    queries = Queries.of(QUERIES, TOKENIZER)
    scores, rng = tfidf_scores(corpus, queries, chunk_rows), np.random.default_rng(0)
    rows_Q = [rng.integers(0, len(corpus), size) for size in (5, len(corpus), 0)]
    for q, found in enumerate(tfidf_ranks(corpus, queries, rows_Q, chunk_rows)):
        of_rows = scores[q][rows_Q[q]]
        np.testing.assert_array_equal(found.score_R, of_rows)
        np.testing.assert_array_equal(found.rank_R, [1 + (scores[q] > score).sum() for score in of_rows])


@pytest.mark.parametrize("k", [1, 4, 60, 100])
def test_the_best_of_a_stream_are_the_first_of_a_stable_sort(k):
    rng = np.random.default_rng(k)
    values, best = rng.integers(0, 6, 60).astype(np.float32), Best(k)
    for places in np.split(np.arange(60), np.sort(rng.integers(0, 61, 7))):
        best.add(values[places], places)
    expected = np.argsort(-values, kind="stable")[:k]
    np.testing.assert_array_equal(best.places, expected)
    np.testing.assert_array_equal(best.values, values[expected])


@pytest.mark.parametrize("k", [1, 7, 60, 100])
@pytest.mark.parametrize("seed", range(3))
def test_with_ties_broken_the_best_do_not_depend_on_the_order_of_the_stream(k, seed):
    rng = np.random.default_rng(seed)
    values, ties = rng.integers(0, 4, 60).astype(np.float32), rng.permutation(60).astype(np.uint64) << np.uint64(58)
    expected = np.lexsort((ties, -values))[:k]
    for order in (np.arange(60), rng.permutation(60)):
        best = Best(k)
        for places in np.split(order, np.sort(rng.integers(0, 61, 7))):
            best.add(values[places], places, ties[places])
        np.testing.assert_array_equal(best.places, expected)
        np.testing.assert_array_equal(best.values, values[expected])


@pytest.mark.parametrize("per_query", [1, 3, 8])
def test_the_same_sequences_are_candidates_of_a_permuted_corpus(tmp_path, per_query):
    texts = [f"the {letter} of" for letter in "abcdefghij"] + ["people", "union", "we"]
    queries, rng, found = Queries.of(QUERIES, TOKENIZER), np.random.default_rng(0), []
    for order in (np.arange(len(texts)), np.arange(len(texts))[::-1], *(rng.permutation(len(texts)) for _ in range(3))):
        path = write_jsonl(tmp_path / "c.jsonl", [{"text": texts[i]} for i in order])
        corpus = Corpus.read(path, TOKENIZER, cache=tmp_path)
        found.append({corpus.text(row) for row in candidates(corpus, queries, per_query)[0]})
    assert all(chosen == found[0] for chosen in found)


@in_chunks
def test_candidates_are_the_best_of_each_query(corpus, chunk_rows):
    queries = Queries.of([QUERIES[0], QUERIES[2]], TOKENIZER)
    scores = tfidf_scores(corpus, queries, chunk_rows)
    rows, info = candidates(corpus, queries, 2, chunk_rows)
    best = [np.lexsort((corpus.keys_N, -score))[:2] for score in scores]
    assert rows.tolist() == np.unique(best).tolist()
    assert (info["per_query"], info["kept"]) == (2, len(rows))
    assert len(candidates(corpus, queries, 100, chunk_rows)[0]) == len(corpus)
