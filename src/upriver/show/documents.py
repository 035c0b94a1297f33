"""Documents ranked by the sum over their sequences, each with the sequences that count most."""

import numpy as np
import pandas as pd

from upriver.show.folder import Folder, Json

PER_SIDE = 20
BEST = 3  # sequences listed with a document


def rank_documents(
    folder: Folder, query_id: str, spans: pd.DataFrame, raw: np.ndarray, passages: list[Json]
) -> dict[str, list[Json]] | None:
    """The documents with the most positive and the most negative sums; None where the run wrote no sums.

    Args:
        spans, raw: ``folder.spans()`` and ``folder.scores(query_id)``.
        passages: those of the query, to which a document's best sequences point.
    """
    sums = folder.documents(query_id)
    if query_id not in sums or "document" not in sums:
        return None
    sums = sums.assign(score=sums[query_id].astype(float)).sort_values("score", ascending=False, kind="stable")
    ends = {
        "positive": sums[sums["score"] > 0].head(PER_SIDE),
        "negative": sums[sums["score"] < 0].tail(PER_SIDE).iloc[::-1],
    }
    sequences = _sequences(spans, raw, set().union(*(end["document"] for end in ends.values())))
    return {side: _side(end, side, sequences, passages, folder.n_train) for side, end in ends.items()}


def _sequences(spans: pd.DataFrame, raw: np.ndarray, chosen: set[str]) -> pd.DataFrame:
    """The scored sequences of the chosen documents."""
    if "document" not in spans or len(spans) != len(raw):
        return pd.DataFrame({"document": []})
    spans = spans.assign(score=raw)
    return spans.loc[spans["document"].isin(list(chosen)) & spans["score"].notna()]


def _side(
    end: pd.DataFrame, side: str, sequences: pd.DataFrame, passages: list[Json], n_train: int | None
) -> list[Json]:
    where = {p["sequence"]: i for i, p in enumerate(passages) if p["side"] == side}
    groups = dict(iter(sequences.groupby("document", sort=False)))
    documents = []
    for rank, row in enumerate(end.to_dict("records"), 1):
        own = groups.get(row["document"])
        best = (
            [] if own is None else own.sort_values("score", ascending=side == "negative").head(BEST).to_dict("records")
        )
        scored = {"score": row["score"], "score_nats": row["score"] / n_train if n_train else None}
        documents.append(
            {
                "side": side,
                "rank": rank,
                "document": row["document"],
                "sequences": row.get("sequences"),
                **scored,
                "best": [_best(entry, where, n_train) for entry in best],
            }
        )
    return documents


def _best(entry: Json, where: dict[int, int], n_train: int | None) -> Json:
    kept = {key: entry.get(key) for key in ("sequence", "start", "end", "score")}
    nats = entry["score"] / n_train if n_train else None
    return {**kept, "score_nats": nats, "passage": where.get(entry["sequence"])}
