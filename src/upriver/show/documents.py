"""How the influence on a question is spread over all sequences, and the documents with the largest sums over theirs.

Axes: N scored sequences, D documents.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from upriver.show.folder import Folder, Json

SIDES = ("positive", "negative")
SURVIVAL_POINTS = 200
TOP_PERCENT = 1
DOCUMENTS_PER_SIDE = 20
BEST_SEQUENCES = 3  # listed with a document


class Unit(NamedTuple):
    """What raw scores of a question are shown in."""

    n_train: int | None  # None: in no unit
    scale: float | None  # None: not calibrated

    def of(self, score: float) -> Json:
        """A score raw, in nats, and in calibrated ones, where these are known."""
        nats = score / self.n_train if self.n_train else None
        calibrated = None if nats is None or self.scale is None else nats * self.scale
        return {"score": score, "score_nats": nats, "calibrated_nats": calibrated}


def spread(raw: np.ndarray, n_train: float | None) -> Json | None:
    """Measure how the influence on one query is spread over all sequences: survival curves and the share of the top 1 %.

    ``survival.positive`` holds points ``[x, share]``: the share of all scored sequences whose score is at least ``x``
    (raw, or nats where ``n_train`` is given: over the scale of a query that was measured);
    ``survival.negative`` the same for ``-score``.  At most 200 points each, evenly
    spaced in the logarithm of the rank.
    """
    scores = raw[np.isfinite(raw)] / (n_train or 1)
    if not len(scores):
        return None
    ordered = np.sort(scores)[::-1]
    top = max(1, math.ceil(len(scores) * TOP_PERCENT / 100))
    positive = np.maximum(ordered, 0)
    total = float(positive.sum())
    survival = {}
    for side, own in zip(SIDES, (ordered[ordered > 0], -ordered[ordered < 0][::-1]), strict=True):
        ranks = np.unique(np.geomspace(1, len(own), SURVIVAL_POINTS).round().astype(int)) if len(own) else []
        survival[side] = [[float(own[rank - 1]), float(rank) / len(scores)] for rank in ranks]
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
        "survival": survival,
    }


class Documents:
    """The documents of a trace, each with the run of its sequences, read once for all questions."""

    def __init__(self, folder: Folder):
        self.folder = folder

    @cached_property
    def spans(self) -> pd.DataFrame:
        return self.folder.spans()

    @cached_property
    def ends_D(self) -> np.ndarray | None:
        """Where the sequences of each document end, which follow each other as the documents do; None if that is not so."""
        names = self.folder.documents([])
        if not {"document", "sequences"} <= set(names.columns) or "document" not in self.spans:
            return None
        ends_D = np.cumsum(names["sequences"].to_numpy())
        same = len(ends_D) and ends_D[-1] == len(self.spans)
        return (
            ends_D
            if same and (self.spans["document"].to_numpy()[ends_D - 1] == names["document"].to_numpy()).all()
            else None
        )

    def ranked(
        self, sums: pd.DataFrame, query: str, raw_N: np.ndarray, unit: Unit, passages: list[Json]
    ) -> dict[str, list[Json]] | None:
        """Rank the documents with the largest sums over their sequences, of either sign; None where the run wrote no sums.

        Args:
            sums: ``folder.documents``.
            passages: those of the query, to which a document's best sequences point.
        """
        if query not in sums or "document" not in sums:
            return None
        score_D = sums[query].to_numpy(np.float64)
        order = np.argsort(-score_D, kind="stable")
        ends = {
            "positive": order[score_D[order] > 0][:DOCUMENTS_PER_SIDE],
            "negative": order[score_D[order] < 0][::-1][:DOCUMENTS_PER_SIDE],
        }
        place = {(p["side"], p["sequence"]): i for i, p in enumerate(passages)}
        ranked: dict[str, list[Json]] = {side: [] for side in ends}
        for side, rows in ends.items():
            for rank, d in enumerate(rows.tolist(), 1):
                told = {"side": side, "rank": rank, "document": sums["document"].iloc[d]}
                told["sequences"] = sums["sequences"].iloc[d] if "sequences" in sums else None
                best = [self._best(n, raw_N[n], unit, place, side) for n in self._extreme(d, raw_N, side)]
                ranked[side].append(told | unit.of(float(score_D[d])) | {"best": best})
        return ranked

    def _extreme(self, d: int, raw_N: np.ndarray, side: str) -> list[int]:
        """The most extreme sequences of a document."""
        if self.ends_D is None or len(raw_N) != len(self.spans):
            return []
        own = np.arange(self.ends_D[d - 1] if d else 0, self.ends_D[d])
        own = own[np.isfinite(raw_N[own])]
        return own[np.argsort(raw_N[own] * (-1 if side == "positive" else 1), kind="stable")][:BEST_SEQUENCES].tolist()

    def _best(self, n: int, score: float, unit: Unit, place: dict[Any, int], side: str) -> Json:
        told = {key: self.spans[key].iloc[n] for key in ("sequence", "start", "end")}
        return told | unit.of(float(score)) | {"passage": place.get((side, told["sequence"]))}
