"""TF-IDF tells which sequences share the words of a query, whatever the model learned from them.

Axes: Q queries, N sequences, C sequences of a chunk, W words (distinct tokens of all queries), R rows that are asked for.
With occurrence 0/1 the score is the sum, over the query's tokens with multiplicity, of
``IDF = log((N - n + 0.5) / (n + 0.5) + 1)`` where the sequence holds the token and ``n`` sequences do (28, 29): BM25 with
``k1 = 0, b = 0``.  The corpus is read twice, once to count ``n`` and once to score, a chunk at a time, so memory does not
grow with it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from upriver.text.corpus import Corpus
from upriver.text.queries import Queries

CHUNK_BYTES = 16 << 20  # of the table of words by sequences
CHUNK_ROWS = 4096


class Best:
    """The ``k`` largest numbers of a stream are kept with their places, the largest first.

    Of equal numbers those of the smaller ``ties`` go first, and without ties those that came first.
    """

    def __init__(self, k: int):
        self.k = k
        self.values, self.places, self.ties = (np.empty(0, kind) for kind in (np.float32, np.int64, np.uint64))

    def add(self, values_C: np.ndarray, places_C: np.ndarray, ties_C: np.ndarray | None = None) -> None:
        ties_C = np.zeros(len(values_C), np.uint64) if ties_C is None else ties_C
        if len(self.values) == self.k:
            last = self.values[-1]
            better = (values_C > last) | (values_C == last) & (ties_C < self.ties[-1])
            values_C, places_C, ties_C = values_C[better], places_C[better], ties_C[better]
        if len(values_C):
            values, places = np.append(self.values, values_C), np.append(self.places, places_C)
            ties = np.append(self.ties, ties_C)
            order = np.lexsort((ties, -values))[: self.k]
            self.values, self.places, self.ties = values[order], places[order], ties[order]


class Tfidf:
    """TF-IDF scores the sequences of a corpus for every query, on the model's tokens (28, 29)."""

    def __init__(self, corpus: Corpus, queries: Queries, chunk_rows: int = CHUNK_ROWS):
        self.corpus = corpus
        tokens_Q = [queries.token_ids(q) for q in range(len(queries))]
        words_W, index = np.unique(np.concatenate(tokens_Q), return_inverse=True)
        self.terms_Q = np.split(index, np.cumsum([len(tokens) for tokens in tokens_Q])[:-1])
        self.place = np.full(max(int(words_W[-1]), corpus.max_token) + 1, -1)
        self.place[words_W] = np.arange(len(words_W))
        self.n_words, self.size = len(words_W), max(1, min(chunk_rows, CHUNK_BYTES // (4 * len(words_W))))
        N, n_W = len(corpus), np.zeros(self.n_words)
        for rows in self._cut(np.arange(N)):
            n_W += self._held(rows).sum(1)
        self.idf_W1 = np.log((N - n_W + 0.5) / (n_W + 0.5) + 1).astype(np.float32)[:, None]

    def _cut(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        return (rows[i : i + self.size] for i in range(0, len(rows), self.size))

    def _held(self, rows: np.ndarray) -> np.ndarray:
        """Mark with 1 which words each sequence holds: float32 ``[W, C]``."""
        tokens = [self.corpus.token_ids(int(row)) for row in rows]
        word = self.place[np.concatenate(tokens)]
        column = np.repeat(np.arange(len(rows)), [len(t) for t in tokens])
        held_WC = np.zeros((self.n_words, len(rows)), np.float32)
        held_WC[word[word >= 0], column[word >= 0]] = 1
        return held_WC

    def scores(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Score sequences (default: all), a chunk at a time: their rows ``[C]``, float32 ``[Q, C]``."""
        for chunk in self._cut(np.arange(len(self.corpus)) if rows is None else rows):
            idf_WC = self._held(chunk)
            idf_WC *= self.idf_W1
            scores_QC = np.zeros((len(self.terms_Q), len(chunk)), np.float32)
            for score_C, terms in zip(scores_QC, self.terms_Q, strict=True):
                for term in terms:  # one after the other: equal words give equal sums, whatever the chunk
                    score_C += idf_WC[term]
            yield chunk, scores_QC


class Ranked(NamedTuple):
    """The rows that were asked for have as their ``rank_R`` 1 + how many sequences of the corpus have a larger ``score_R``."""

    rank_R: np.ndarray
    score_R: np.ndarray


def tfidf_ranks(
    corpus: Corpus, queries: Queries, rows_Q: list[np.ndarray], chunk_rows: int = CHUNK_ROWS
) -> list[Ranked]:
    """Rank and score the sequences ``rows_Q[q]`` of each query by TF-IDF among all of the corpus."""
    tfidf = Tfidf(corpus, queries, chunk_rows)
    score_QR = [np.zeros(len(rows), np.float32) for rows in rows_Q]
    for chunk, scores_QC in tfidf.scores(np.unique(np.concatenate([*rows_Q, np.empty(0, np.int64)]))):
        for score_R, rows, score_C in zip(score_QR, rows_Q, scores_QC, strict=True):
            inside = np.isin(rows, chunk)
            score_R[inside] = score_C[np.searchsorted(chunk, rows[inside])]
    sorted_Q = [np.sort(score_R) for score_R in score_QR]
    above_Q = [np.zeros(len(score_R) + 1, np.int64) for score_R in score_QR]  # by how many of the sorted are smaller
    for _, scores_QC in tfidf.scores():
        for above, sorted_R, score_C in zip(above_Q, sorted_Q, scores_QC, strict=True):
            above += np.bincount(np.searchsorted(sorted_R, score_C), minlength=len(above))
    return [
        Ranked(1 + np.cumsum(above[::-1])[::-1][np.searchsorted(sorted_R, score_R, side="right")], score_R)
        for above, sorted_R, score_R in zip(above_Q, sorted_Q, score_QR, strict=True)
    ]


def candidates(
    corpus: Corpus, queries: Queries, per_query: int, chunk_rows: int = CHUNK_ROWS
) -> tuple[np.ndarray, dict[str, Any]]:
    """Choose the sequences worth scoring: of each query the ``per_query`` best by TF-IDF, equal scores by `keys_N`.

    Returns the sorted rows, int64, and what was kept, for the manifest.
    """
    best_Q = [Best(per_query) for _ in range(len(queries))]
    for chunk, scores_QC in Tfidf(corpus, queries, chunk_rows).scores():
        for best, score_C in zip(best_Q, scores_QC, strict=True):
            best.add(score_C, chunk, corpus.keys_N[chunk])
    rows = np.unique(np.concatenate([best.places for best in best_Q]))
    note = f"only the {per_query} best sequences of each query by TF-IDF were scored, {len(rows)} of {len(corpus)}"
    return rows, {"per_query": per_query, "kept": len(rows), "note": note}
