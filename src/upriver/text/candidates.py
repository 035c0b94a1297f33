"""TF-IDF: which sequences share the words of a query, whatever the model learned from them.

Axes: Q queries, N sequences.  With occurrence 0/1 the score is the sum, over the query's tokens with multiplicity, of
``IDF = log((N - n + 0.5) / (n + 0.5) + 1)`` where the sequence holds the token and ``n`` sequences do (28, 29): BM25
with ``k1 = 0, b = 0``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from upriver.text.corpus import Corpus
from upriver.text.queries import Queries


def tfidf_scores(corpus: Corpus, queries: Queries, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """TF-IDF of every sequence for every query, on the model's tokens: float32 ``[Q, N]`` (28, 29).

    ``progress`` is called with the sequences read so far and their number.
    """
    tokens_Q = [queries.token_ids(i) for i in range(len(queries))]
    wanted, index = np.unique(np.concatenate(tokens_Q), return_inverse=True)
    found = _occurrences(corpus, wanted, progress or (lambda done, total: None))
    scores_QN = np.zeros((len(queries), len(corpus)), np.float32)
    if any(found):
        retriever = _index(found, len(wanted))
        boundaries = np.cumsum([len(tokens) for tokens in tokens_Q])[:-1]
        for q, terms in enumerate(np.split(index, boundaries)):
            scores_QN[q] = retriever.get_scores_from_ids(terms.tolist())
    return scores_QN


def _occurrences(corpus: Corpus, wanted: np.ndarray, progress: Callable[[int, int], None]) -> list[list[int]]:
    """Which of the ``wanted`` tokens each sequence holds, as indices into them: all that the scores depend on."""
    place = np.full(max(int(wanted[-1]), corpus.max_token) + 1, -1)
    place[wanted] = np.arange(len(wanted))
    found = []
    for row in range(len(corpus)):
        places = np.unique(place[corpus.token_ids(row)])
        found.append(places[places >= 0].tolist())
        if row % 1024 == 0:
            progress(row, len(corpus))
    progress(len(corpus), len(corpus))
    return found


def _index(found: list[list[int]], n_terms: int) -> Any:
    import bm25s

    retriever = bm25s.BM25(k1=0, b=0, method="lucene")
    retriever.index((found, {term: term for term in range(n_terms)}), create_empty_token=False, show_progress=False)
    return retriever


def candidates(
    corpus: Corpus, queries: Queries, per_query: int, progress: Callable[[int, int], None] | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """The sequences worth scoring: of each query the ``per_query`` best by TF-IDF, equal scores in corpus order.

    Returns the sorted rows, int64, and what was kept, for the manifest.
    """
    scores_QN = tfidf_scores(corpus, queries, progress)
    best = np.argsort(-scores_QN, axis=1, kind="stable")[:, :per_query]
    rows = np.unique(best).astype(np.int64)
    note = f"only the {per_query} best sequences of each query by TF-IDF were scored, {len(rows)} of {len(corpus)}"
    return rows, {"per_query": per_query, "kept": len(rows), "note": note}
