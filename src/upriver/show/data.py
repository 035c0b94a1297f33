"""``report.json``: everything the page shows, built from a SCORES folder (format: docs/report.md)."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from upriver.runtime.config import POSITIVE
from upriver.show.documents import rank_documents
from upriver.show.folder import Folder, Json, metadata_of
from upriver.show.passages import concentration, matches, near_duplicates, query_words, sentences
from upriver.show.spread import spread
from upriver.show.trust import short_name, trust
from upriver.text.records import whole

VERSION = 1
DEPTH_BLOCKS = 9
SIDES = ("positive", "negative")


def build_report(folder: Folder) -> Json:
    """The content of ``report.json`` as plain lists, dictionaries, strings and numbers."""
    layers, spans = _layers(folder.manifest), folder.spans()
    queries = [_query(folder, query, spans) for query in folder.queries]
    return _clean(
        {
            "format": "upriver-report",
            "version": VERSION,
            "sign": sign(folder),
            "unit": unit(folder),
            "n_train": folder.n_train,
            "candidates": bool(folder.manifest.get("candidates")),
            "layers": layers,
            "depth": _depth(layers),
            "run": _run(folder.manifest),
            "trust": trust(folder.manifest, queries),
            "manifest": folder.manifest,
            "queries": queries,
        }
    )


def sign(folder: Folder) -> str:
    """What a positive score means."""
    return folder.manifest.get("sign") or POSITIVE


def unit(folder: Folder) -> str:
    """What a score is a number of."""
    n_train = folder.n_train
    if folder.manifest.get("curvature") == "identity":
        return "Scores are dot products of gradients, without the curvature: they rank passages, and are in no unit."
    if not n_train:
        return "Scores are raw influences: the number of training sequences, which turns them into nats, is not known."
    if all(query.get("log_prob") is None for query in folder.queries):
        return (
            "A score in nats, or whatever unit the measurement has, is the first-order estimate of how much the measurement "
            f"changes when one more copy of the example is added to the {n_train:,} training sequences: the raw score divided "
            f"by {n_train:,}."
        )
    return (
        "A score in nats is the first-order estimate of how much the log-probability changes when one more copy of "
        f"the passage is added to the {n_train:,} training sequences: the raw score divided by {n_train:,}."
    )


def _run(manifest: Json) -> Json:
    """What the page's first line says."""
    model, corpus = manifest.get("model") or {}, manifest.get("corpus") or {}
    return {
        "model": short_name(str(model.get("name") or "")) or None,
        "corpus": str(corpus.get("path") or "").rstrip("/").rsplit("/", 1)[-1] or None,
        "documents": corpus.get("documents"),
        "sequences": manifest.get("scored_sequences") or corpus.get("sequences"),
        "upriver": manifest.get("upriver"),
    }


def _layers(manifest: Json) -> list[Json]:
    """The tracked layers with the depth group of each: nine groups of blocks, or one per block when there are fewer.

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


def _depth(layers: list[Json]) -> list[Json]:
    blocks: dict[int, list[int]] = {}
    for layer in layers:
        if layer["depth"] is not None:
            blocks.setdefault(layer["depth"], []).append(layer["block"])
    return [{"first": min(blocks[d]), "last": max(blocks[d])} for d in sorted(blocks)]


def _query(folder: Folder, query: Json, spans: pd.DataFrame) -> Json:
    """One question with everything that the page shows of it."""
    raw, shown = folder.scores(str(query["id"])), answer(folder, query)
    return shown | {
        "spread": spread(raw, folder.n_train),
        "documents": rank_documents(folder, str(query["id"]), spans, raw, shown["passages"]),
    }


def answer(folder: Folder, query: Json) -> Json:
    """One question, its answer and its passages; what memory it takes does not depend on the number of sequences."""
    rows = folder.top.loc[folder.top["query"].astype(str) == str(query["id"])]
    words = query_words(f"{query.get('prompt') or ''} {query.get('completion') or ''}")
    passages = [
        p for side in SIDES for p in _side(rows[rows["side"] == side].sort_values("rank"), words, folder.n_train)
    ]
    keys = ("id", "prompt", "completion", "contrast", "generated", "log_prob", "measurement", "completion_tokens")
    return {
        **{key: query.get(key) for key in (*keys, "contrast_tokens")},
        "rank_correlation": query.get("rank_correlation"),
        "words": sorted(words),
        "passages": passages,
    }


def _side(rows: pd.DataFrame, words: frozenset[str], n_train: int | None) -> list[Json]:
    passages = [_passage(row, words, n_train) for row in rows.to_dict("records")]
    for passage, leader in zip(passages, near_duplicates([p["text"] for p in passages]), strict=True):
        passage["duplicate_of"] = None if passages[leader] is passage else passages[leader]["rank"]
    return passages


def _passage(row: Json, words: frozenset[str], n_train: int | None) -> Json:
    tokens, token_scores, layers = (_list(row.get(key)) for key in ("tokens", "token_scores", "layers"))
    text = row.get("text") if isinstance(row.get("text"), str) else "".join(tokens)
    if len(tokens) != len(token_scores):
        tokens, token_scores = [], []
    values = np.asarray(token_scores, np.float64)
    score = float(row["score"])
    return {
        **{key: row.get(key) for key in ("side", "rank", "sequence", "document", "start", "end")},
        "score": score,
        "score_nats": score / n_train if n_train else None,
        **{key: row.get(key) for key in ("scan_score", "rescored", "spurious", "tfidf_score", "overlap")},
        "tfidf_rank": _integer(row.get("tfidf_rank")),
        "concentration": concentration(values),
        "metadata": metadata_of(row.get("metadata")),
        "text": text,
        "tokens": tokens,
        "token_scores": token_scores,
        "matches": matches(tokens, words),
        "sentences": [_sentence(values, a, b) for a, b in sentences(tokens)],
        "layers": layers,
        "sums": {"tokens": float(values.sum()) if tokens else None, "layers": math.fsum(layers) if layers else None},
    }


def _sentence(values: np.ndarray, start: int, end: int) -> Json:
    """The sums over a sentence: of the tokens that carry the gradient in it, and of those whose next token is in it."""
    carried, predicted = values[start:end].sum(), values[max(0, start - 1) : end - 1].sum()
    return {"start": start, "end": end, "carried": float(carried), "predicted": float(predicted)}


def _list(value: Any) -> list[Any]:
    return [] if value is None or isinstance(value, float) else list(value)


def _integer(value: Any) -> int | None:
    return None if value is None or value is pd.NA or value != value else int(value)


def _clean(value: Any) -> Any:
    """Plain JSON values: no NumPy types, no NaN, and no lone surrogate, which UTF-8 cannot hold."""
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(entry) for entry in value]
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return None if value is None or value is pd.NA or value is pd.NaT else str(value)
