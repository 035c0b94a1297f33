"""``report.json`` holds everything the page shows; it is built from a SCORES folder (format: docs/report.md)."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from upriver.evaluate.verified import compared
from upriver.influence.results import calibration
from upriver.runtime.config import PLAIN_GRADIENTS, POSITIVE
from upriver.show.folder import Folder, Json, corpus_name, metadata_of
from upriver.show.passages import concentration, matches, near_duplicates, query_words, sentences
from upriver.show.trust import short_name, trust
from upriver.text.records import whole

VERSION = 1
DEPTH_BLOCKS = 9
SIDES = ("positive", "negative")
SURVIVAL_POINTS = 200
TOP_PERCENT = 1
DOCUMENTS_PER_SIDE = 20
BEST_SEQUENCES = 3  # listed with a document


def build_report(folder: Folder) -> Json:
    """Build the content of ``report.json`` from plain lists, dictionaries, strings and numbers."""
    manifest, layers, spans = folder.manifest, layers_by_depth(folder.manifest), folder.spans()
    blocks: dict[int, list[int]] = {}
    for layer in layers:
        if layer["depth"] is not None:
            blocks.setdefault(layer["depth"], []).append(layer["block"])
    queries = []
    for query in folder.queries:
        raw, shown = folder.scores(str(query["id"])), answer(folder, query)
        documents = rank_documents(folder, str(query["id"]), spans, raw, shown["passages"])
        queries.append(
            shown
            | {
                "spread": spread(raw, folder.n_train and folder.n_train / (shown["calibration"] or 1)),
                "documents": documents,
            }
        )
    model, corpus = manifest.get("model") or {}, manifest.get("corpus") or {}
    report = {
        "format": "upriver-report",
        "version": VERSION,
        "sign": sign(folder),
        "unit": unit(folder),
        "n_train": folder.n_train,
        "candidates": bool(manifest.get("candidates")),
        "layers": layers,
        "depth": [{"first": min(blocks[d]), "last": max(blocks[d])} for d in sorted(blocks)],
        "run": {
            "model": short_name(str(model.get("name") or "")) or None,
            "corpus": corpus_name(corpus),
            "documents": corpus.get("documents"),
            "sequences": manifest.get("scored_sequences") or corpus.get("sequences"),
            "upriver": manifest.get("upriver"),
        },
        "verified": _verified(folder),
        "trust": trust(manifest, queries, _verified(folder)),
        "manifest": manifest,
        "queries": queries,
    }
    return _clean(report)


def sign(folder: Folder) -> str:
    """Say what a positive score means."""
    return folder.manifest.get("sign") or POSITIVE


def unit(folder: Folder) -> str:
    """Say what a score is a number of."""
    n_train = folder.n_train
    if folder.manifest.get("curvature") in PLAIN_GRADIENTS:
        return "Scores are dot products of gradients, without the curvature: they rank passages, and are in no unit."
    if not n_train:
        return "Scores are raw influences: the number of training sequences, which turns them into nats, is not known."
    if all(query.get("log_prob") is None for query in folder.queries):
        return (
            "A score in nats, or whatever unit the measurement has, is the first-order estimate of how much the measurement "
            f"changes when one more copy of the example is added to the {n_train:,} training sequences: the raw score divided "
            f"by {n_train:,}{_calibrated(folder)}"
        )
    return (
        "A score in nats is the first-order estimate of how much the log-probability changes when one more copy of "
        f"the passage is added to the {n_train:,} training sequences: the raw score divided by {n_train:,}{_calibrated(folder)}"
    )


def _calibrated(folder: Folder) -> str:
    """Say whether the lengths of the solutions, and so the nats, were measured."""
    known = sum(calibration(query.get("solution")) is not None for query in folder.queries)
    if not known:
        return ", not calibrated: the length of the solutions was not measured, so read nats as ranks."
    whose = "its" if len(folder.queries) == 1 else "its question's"
    rest = f" ({len(folder.queries) - known} questions are not calibrated)" if known < len(folder.queries) else ""
    return f" and, to calibrate it, times {whose} best scale on held-out sequences{rest}."


def layers_by_depth(manifest: Json) -> list[Json]:
    """Put the tracked layers into groups by depth: nine groups of blocks, or one per block when there are fewer.

    Groups without a tracked layer are left out.  Layers of a block whose names end alike are told apart by one part more.
    """
    layers = [dict(layer) for layer in manifest.get("layers") or []]
    n_blocks = max((layer["block"] + 1 for layer in layers if layer.get("block") is not None), default=0)
    groups = min(DEPTH_BLOCKS, n_blocks)
    found = [None if x.get("block") is None else x["block"] * groups // n_blocks for x in layers]
    place = {group: i for i, group in enumerate(sorted({group for group in found if group is not None}))}
    cells = Counter((x.get("block"), x.get("kind")) for x in layers)
    for layer, group in zip(layers, found, strict=True):
        layer["depth"] = None if group is None else place[group]
        if cells[layer.get("block"), layer.get("kind")] > 1:
            layer["kind"] = ".".join(str(layer["name"]).split(".")[-2:])
    return layers


def answer(folder: Folder, query: Json) -> Json:
    """Collect one question, its answer and its passages; the memory it takes does not depend on the number of sequences."""
    rows = folder.top.loc[folder.top["query"].astype(str) == str(query["id"])]
    texts = [f"{x.get('prompt') or ''} {x.get('completion') or ''}" for x in query.get("members") or [query]]
    words = query_words(" ".join(texts))
    passages, found = [], _verified(folder, str(query["id"]))
    scale = calibration(query.get("solution")) if folder.n_train else None
    realised = {row: nats for _, nats, shown, row in found["pairs"] if shown} if found else {}
    for side in SIDES:
        own = rows[rows["side"] == side].sort_values("rank").to_dict("records")
        ranked = [_passage(row, words, folder.n_train, scale) for row in own]
        for passage, leader in zip(ranked, near_duplicates([p["text"] for p in ranked]), strict=True):
            passage["duplicate_of"] = None if ranked[leader] is passage else ranked[leader]["rank"]
            passage["realised_nats"] = realised.get(passage["sequence"])
        passages += ranked
    keys = ("id", "prompt", "completion", "contrast", "generated", "log_prob", "measurement", "completion_tokens")
    shared = {key: query[key] for key in ("labels", "members", "direction", "layer") if query.get(key)}
    return {
        **{key: query.get(key) for key in (*keys, "contrast_tokens", "rank_correlation", "solution")},
        "calibration": scale,
        **shared,
        "words": sorted(words),
        "passages": passages,
        "verified": found and {key: found[key] for key in ("residual", "length", "shown", "random", "pairs")},
    }


def _verified(folder: Folder, query: str | None = None) -> Json | None:
    """What a verification says of all questions, or of one with its ``pairs``: predicted, realised, whether shown, sequence."""
    if folder.verified is None:
        return None
    told, table = folder.verified
    if query is None:
        worst = max((x["residual"] for x in told["queries"] if x["residual"] is not None), default=None)
        keys = ("how", "shown", "random", "sample", "length_from", "seconds")
        return {key: told[key] for key in keys} | {"residual": worst}
    own = table[table["query"] == query]
    own = own.assign(predicted_nats=compared(own))
    columns = ("predicted_nats", "realised_nats", "shown", "sequence")
    found = next((entry for entry in told["queries"] if entry["id"] == query), None)
    return found and found | {"pairs": [list(row) for row in zip(*(own[c].tolist() for c in columns), strict=True)]}


def _passage(row: Json, words: frozenset[str], n_train: int | None, scale: float | None) -> Json:
    tokens, token_scores, layers = (
        [] if value is None or isinstance(value, float) else list(value)
        for value in map(row.get, ("tokens", "token_scores", "layers"))
    )
    text = row.get("text") if isinstance(row.get("text"), str) else "".join(tokens)
    if len(tokens) != len(token_scores):
        tokens, token_scores = [], []
    values, tfidf_rank = np.asarray(token_scores, np.float64), row.get("tfidf_rank")
    return {
        **{key: row.get(key) for key in ("side", "rank", "sequence", "document", "start", "end")},
        **_in_nats(float(row["score"]), n_train, scale),
        **{key: row.get(key) for key in ("scan_score", "rescored", "spurious", "tfidf_score", "overlap")},
        "tfidf_rank": None if tfidf_rank is None or pd.isna(tfidf_rank) else int(tfidf_rank),
        "concentration": concentration(values),
        "metadata": metadata_of(row.get("metadata")),
        "text": text,
        "tokens": tokens,
        "token_scores": token_scores,
        "matches": matches(tokens, words),
        # the tokens that carry the gradient are in the sentence, or those whose next token is
        "sentences": [
            {"start": a, "end": b, "carried": values[a:b].sum(), "predicted": values[max(0, a - 1) : b - 1].sum()}
            for a, b in sentences(tokens)
        ],
        "layers": layers,
        "sums": {"tokens": float(values.sum()) if tokens else None, "layers": math.fsum(layers) if layers else None},
    }


def _in_nats(score: float, n_train: int | None, scale: float | None) -> Json:
    nats = score / n_train if n_train else None
    return {
        "score": score,
        "score_nats": nats,
        "calibrated_nats": None if nats is None or scale is None else nats * scale,
    }


def shown_nats(passage: Json) -> float | None:
    """The calibrated nats where the scale is known, else the plain ones, if there are any."""
    return passage["score_nats"] if passage["calibrated_nats"] is None else passage["calibrated_nats"]


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


def rank_documents(
    folder: Folder, query_id: str, spans: pd.DataFrame, raw: np.ndarray, passages: list[Json]
) -> dict[str, list[Json]] | None:
    """Rank the documents with the largest sums over their sequences, of either sign; None where the run wrote no sums.

    Args:
        spans, raw: ``folder.spans()`` and ``folder.scores(query_id)``.
        passages: those of the query, to which a document's best sequences point.
    """
    sums, n_train = folder.documents(query_id), folder.n_train
    asked = next((q for q in folder.queries if str(q["id"]) == query_id), {})
    scale = calibration(asked.get("solution")) if n_train else None
    if query_id not in sums or "document" not in sums:
        return None
    sums = sums.assign(score=sums[query_id].astype(float)).sort_values("score", ascending=False, kind="stable")
    ends = {
        "positive": sums[sums["score"] > 0].head(DOCUMENTS_PER_SIDE),
        "negative": sums[sums["score"] < 0].tail(DOCUMENTS_PER_SIDE).iloc[::-1],
    }
    groups = {}
    if "document" in spans and len(spans) == len(raw):
        scored, chosen = spans.assign(score=raw), set().union(*(end["document"] for end in ends.values()))
        scored = scored.loc[scored["document"].isin(list(chosen)) & scored["score"].notna()]
        groups = dict(iter(scored.groupby("document", sort=False)))
    place = {(p["side"], p["sequence"]): i for i, p in enumerate(passages)}
    ranked: dict[str, list[Json]] = {side: [] for side in ends}
    for side, end in ends.items():
        for rank, row in enumerate(end.to_dict("records"), 1):
            document = {"side": side, "rank": rank, "document": row["document"], "sequences": row.get("sequences")}
            document |= _in_nats(row["score"], n_train, scale) | {"best": []}
            own = groups.get(row["document"], pd.DataFrame({"score": []})).sort_values(
                "score", ascending=side == "negative"
            )
            for entry in own.head(BEST_SEQUENCES).to_dict("records"):
                best = {key: entry.get(key) for key in ("sequence", "start", "end")} | _in_nats(
                    entry["score"], n_train, scale
                )
                document["best"].append(best | {"passage": place.get((side, entry["sequence"]))})
            ranked[side].append(document)
    return ranked


def _clean(value: Any) -> Any:
    """Turn values into plain JSON: no NumPy types, no NaN, and no lone surrogate, which UTF-8 cannot hold."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    return value if isinstance(value, int) else whole(str(value))
