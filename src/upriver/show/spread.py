"""How the influence on a query is spread over all sequences: survival curves and the share of the top 1 %."""

import math
from typing import Any

import numpy as np

POINTS = 200
TOP_PERCENT = 1


def spread(raw: np.ndarray, n_train: int | None) -> dict[str, Any] | None:
    """The survival curves of all scores of one query and how concentrated they are.

    ``survival.positive`` holds points ``[x, share]``: the share of all scored sequences whose score is at least ``x``
    (nats, or raw without ``n_train``); ``survival.negative`` the same for ``-score``.  At most 200 points each, evenly
    spaced in the logarithm of the rank.
    """
    scores = raw[np.isfinite(raw)] / (n_train or 1)
    if not len(scores):
        return None
    ordered = np.sort(scores)[::-1]
    top = max(1, math.ceil(len(scores) * TOP_PERCENT / 100))
    positive = np.maximum(ordered, 0)
    total = float(positive.sum())
    return {
        "sequences": len(scores),
        "positive": int((scores > 0).sum()),
        "largest": float(ordered[0]),
        "smallest": float(ordered[-1]),
        "positive_sum": total,
        "negative_sum": float(np.minimum(ordered, 0).sum()),
        "top_percent": TOP_PERCENT,
        "top_sequences": top,
        "top_share": float(positive[:top].sum()) / total if total > 0 else None,
        "survival": {"positive": survival(scores), "negative": survival(-scores)},
    }


def survival(scores: np.ndarray) -> list[list[float]]:
    """Points ``[x, share of all scores that are at least x]`` for positive ``x``, the largest first."""
    ordered = np.sort(scores[scores > 0])[::-1]
    if not len(ordered):
        return []
    ranks = np.unique(np.geomspace(1, len(ordered), POINTS).round().astype(int))
    return [[float(ordered[rank - 1]), float(rank) / len(scores)] for rank in ranks]
