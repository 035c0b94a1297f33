"""The TF-IDF filter agrees with its formula."""

import math

import numpy as np
import pytest

from text_cases import LINES, byte_tokenizer, write_jsonl
from upriver.text.candidates import candidates, tfidf_scores
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


def test_scores_are_those_of_the_formula(corpus):
    queries = Queries.of(QUERIES, TOKENIZER)
    scores = tfidf_scores(corpus, queries)
    assert scores.shape == (3, len(corpus))
    assert scores.dtype == np.float32
    for q in range(3):
        np.testing.assert_allclose(scores[q], written_out(corpus, queries.token_ids(q)), rtol=1e-6)
    assert (scores[1] == 0).all()


def test_queries_that_share_nothing_with_the_corpus(corpus):
    assert (tfidf_scores(corpus, Queries.of(QUERIES[1:2], TOKENIZER)) == 0).all()


def test_candidates_are_the_best_of_each_query(corpus):
    queries = Queries.of([QUERIES[0], QUERIES[2]], TOKENIZER)
    scores, seen = tfidf_scores(corpus, queries), []
    rows, info = candidates(corpus, queries, 2, progress=lambda done, total: seen.append((done, total)))
    assert rows.tolist() == sorted(set(rows.tolist()))
    for q in range(2):
        assert set(np.argsort(-scores[q], kind="stable")[:2].tolist()) <= set(rows.tolist())
    assert (info["per_query"], info["kept"]) == (2, len(rows))
    assert seen[-1] == (len(corpus), len(corpus))
    assert len(candidates(corpus, queries, 100)[0]) == len(corpus)
