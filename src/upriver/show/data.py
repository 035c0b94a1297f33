"""``report.json`` holds everything the page shows; it is built from a SCORES folder (format: docs/report.md)."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from upriver.evaluate.verified import compared
from upriver.influence.results import calibration
from upriver.runtime.config import PLAIN_GRADIENTS, POSITIVE
from upriver.show.documents import SIDES, Documents, Unit, spread
from upriver.show.folder import Folder, Json, corpus_name, metadata_of
from upriver.show.groups import Table
from upriver.show.passages import concentration, matches, near_duplicates, query_words, sentences
from upriver.show.trust import short_name, trust
from upriver.text.records import whole

VERSION = 1
DEPTH_BLOCKS = 9
PASSAGES, LEAST = 20_000, 5  # that a report shows of all questions at most, and of a side of each at least
AT_ONCE = 1 << 24  # scores that are read at once
GROUPS = 20  # that are shown of a question


def shown_rank(folder: Folder) -> int:
    """Up to which rank passages are shown."""
    return max(LEAST, PASSAGES // (2 * len(folder.queries)))


def report_head(folder: Folder, tables: list[Table]) -> Json:
    """What a report says of the run, without its questions."""
    manifest, layers = folder.manifest, layers_by_depth(folder.manifest)
    blocks: dict[int, list[int]] = {}
    for layer in layers:
        if layer["depth"] is not None:
            blocks.setdefault(layer["depth"], []).append(layer["block"])
    model, corpus = manifest.get("model") or {}, manifest.get("corpus") or {}
    head = {
        "format": "upriver-report",
        "version": VERSION,
        "sign": sign(folder),
        "unit": unit(folder),
        "n_train": folder.n_train,
        "candidates": bool(manifest.get("candidates")),
        "shown_rank": shown_rank(folder),
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
        "groups": [{key: value for key, value in told.items() if key != "scores"} for told, _ in tables],
        "manifest": manifest,
    }
    return clean(head)


def report_trust(folder: Folder, queries: list[Json]) -> list[Json]:
    """The trust panel; of a passage it takes ``score``, ``sums`` and ``rescored``."""
    return clean(trust(folder.manifest, queries, _verified(folder)))


def report_queries(folder: Folder, tables: list[Table]) -> Iterator[Json]:
    """The questions one after the other, each with its passages, documents and groups; one is in memory at a time."""
    documents, most = Documents(folder), shown_rank(folder)
    groups = [dict(iter(frame.groupby("query", sort=False))) for _, frame in tables]
    some = max(1, AT_ONCE // max(1, len(documents.spans)))
    for first in range(0, len(folder.queries), some):
        asked = folder.queries[first : first + some]
        ids = [str(query["id"]) for query in asked]
        scores, sums = folder.scores(ids), folder.documents(ids)
        for name, query in zip(ids, asked, strict=True):
            raw_N = scores[name].to_numpy(np.float64) if name in scores else np.empty(0)
            shown = answer(folder, query, most)
            own = Unit(folder.n_train, shown["calibration"])
            yield clean(
                shown
                | {
                    "spread": spread(raw_N, folder.n_train and folder.n_train / (own.scale or 1)),
                    "documents": documents.ranked(sums, name, raw_N, own, shown["passages"]),
                    "groups": [_groups(found.get(name)) for found in groups],
                }
            )


def _groups(rows: pd.DataFrame | None) -> list[Json]:
    """A question's sums by the groups of a field, the largest where there are many, and those of its differences to others."""
    told, parts = [], () if rows is None else rows.groupby("minus", sort=False, dropna=False)
    for minus, own in parts:
        sums: Any = own["sum"]
        kept: Any = own.loc[sorted(sums.abs().nlargest(GROUPS).index)].drop(columns=["query", "minus"])
        told.append(
            {"minus": minus if isinstance(minus, str) else None, "of": len(own), "rows": kept.to_dict("records")}
        )
    return sorted(told, key=lambda x: x["minus"] is not None)


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


def answer(folder: Folder, query: Json, most: int | None = None, sides: tuple[str, ...] = SIDES) -> Json:
    """Collect one question, its answer and its passages; the memory it takes does not depend on the number of sequences.

    Args:
        most: passages of a side.
    """
    texts = [f"{x.get('prompt') or ''} {x.get('completion') or ''}" for x in query.get("members") or [query]]
    words = query_words(" ".join(texts))
    passages, found = [], _verified(folder, str(query["id"]))
    own = Unit(folder.n_train, calibration(query.get("solution")) if folder.n_train else None)
    realised = {row: nats for _, nats, shown, row in found["pairs"] if shown} if found else {}
    for side in sides:
        ranked = [_passage(row, words, own) for row in folder.top.rows(str(query["id"]), side, most)]
        for passage, leader in zip(ranked, near_duplicates([p["text"] for p in ranked]), strict=True):
            passage["duplicate_of"] = None if ranked[leader] is passage else ranked[leader]["rank"]
            passage["realised_nats"] = realised.get(passage["sequence"])
        passages += ranked
    keys = ("id", "prompt", "completion", "contrast", "generated", "log_prob", "measurement", "completion_tokens")
    shared = {key: query[key] for key in ("labels", "members", "direction", "layer") if query.get(key)}
    return {
        **{key: query.get(key) for key in (*keys, "contrast_tokens", "rank_correlation", "solution")},
        "calibration": own.scale,
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


def _passage(row: Json, words: frozenset[str], own: Unit) -> Json:
    tokens = row.get("tokens") or []
    layers, values = (np.asarray(row.get(name, ()), np.float64) for name in ("layers", "token_scores"))
    text = row.get("text") if isinstance(row.get("text"), str) else "".join(tokens)
    if len(tokens) != len(values):
        tokens, values = [], np.empty(0)
    tfidf_rank = row.get("tfidf_rank")
    return {
        **{key: row.get(key) for key in ("side", "rank", "sequence", "document", "start", "end")},
        **own.of(float(row["score"])),
        **{key: row.get(key) for key in ("scan_score", "rescored", "spurious", "tfidf_score", "overlap")},
        "tfidf_rank": None if tfidf_rank is None or pd.isna(tfidf_rank) else int(tfidf_rank),
        "concentration": concentration(values),
        "metadata": metadata_of(row.get("metadata")),
        "text": text,
        "tokens": tokens,
        "token_scores": values,
        "matches": matches(tokens, words),
        # the tokens that carry the gradient are in the sentence, or those whose next token is
        "sentences": [
            {"start": a, "end": b, "carried": values[a:b].sum(), "predicted": values[max(0, a - 1) : b - 1].sum()}
            for a, b in sentences(tokens)
        ],
        "layers": layers,
        "sums": {
            "tokens": float(values.sum()) if tokens else None,
            "layers": math.fsum(layers) if len(layers) else None,
        },
    }


def shown_nats(passage: Json) -> float | None:
    """The calibrated nats where the scale is known, else the plain ones, if there are any."""
    return passage["score_nats"] if passage["calibrated_nats"] is None else passage["calibrated_nats"]


def clean(value: Any) -> Any:
    """Turn values into plain JSON: no NumPy types, no NaN, and no lone surrogate, which UTF-8 cannot hold."""
    if isinstance(value, np.ndarray):
        return [float(f"{x:.7g}") if math.isfinite(x) else None for x in value.tolist()]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, dict):
        return {clean(str(key)): clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    return value if isinstance(value, int) else _text(str(value))


def _text(text: str) -> str:
    return text if text.isascii() else whole(text)
