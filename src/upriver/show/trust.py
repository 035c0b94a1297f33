"""The trust panel: what the numbers rest on, in words, from the manifest; a fact that is not there is left out."""

from collections.abc import Iterator
from typing import Any

from upriver.show.folder import Json

GOOD, FAIR = 0.95, 0.8  # correlations: above the first fine, below the second a warning
EXACT = 1e-3  # relative difference of a sum that should be equal


def trust(manifest: Json, queries: list[Json]) -> list[Json]:
    """Groups of facts: ``[{title, facts: [{label, value, note, state}]}]``; state is ``ok``, ``warn`` or null."""
    groups = {
        "Checks": _checks(manifest, queries),
        "Method": _method(manifest),
        "Model": _model(manifest),
        "Versions": (_fact(name, str(v)) for name, v in (manifest.get("versions") or {}).items()),
        "Corpus": _corpus(manifest),
    }
    built = [{"title": title, "facts": list(facts)} for title, facts in groups.items()]
    return [group for group in built if group["facts"]]


def _fact(label: str, value: str, note: str = "", state: str | None = None) -> Json:
    return {"label": label, "value": value, "note": note, "state": state}


def _graded(label: str, entry: Any, note: str) -> Json:
    """A correlation: its mean, with the worst case in the note."""
    mean, worst = (entry.get("mean"), entry.get("worst")) if isinstance(entry, dict) else (entry, None)
    note = str(entry.get("what") or note) if isinstance(entry, dict) else note
    if not isinstance(mean, (int, float)):
        return _fact(label, "not measured", note)
    state = "ok" if mean >= GOOD else "warn" if mean < FAIR else None
    return _fact(label, f"{mean:.3f}", f"{note}; worst {worst:.3f}" if isinstance(worst, (int, float)) else note, state)


def _checks(manifest: Json, queries: list[Json]) -> Iterator[Json]:
    coverage = manifest.get("coverage")
    if coverage:
        yield _coverage(coverage)
    halves = (manifest.get("fit") or {}).get("halves")
    if halves is not None:
        yield _graded("Convergence of the factors", halves, "correlation between the two halves of the fitting sample")
    if manifest.get("rank_error") is not None:
        note = "correlation of the compressed scan with the full-rank scores"
        full = manifest.get("rank") == "full"
        name = "Scan against rescoring" if full else f"Rank {manifest.get('rank', '')} against full rank"
        yield _graded(name, manifest["rank_error"], note)
    for name, what in (("tokens", "Sum over tokens"), ("layers", "Sum over layers")):
        error = _largest_difference(queries, name)
        if error is not None:
            state = "ok" if error <= EXACT else "warn"
            yield _fact(f"{what} = score", _power(error), "largest relative difference in the passages shown", state)
    rescored = [p["rescored"] for q in queries for p in q["passages"] if p["rescored"] is not None]
    if rescored:
        share = sum(map(bool, rescored)) / len(rescored)
        yield _fact(
            "Rescored at full rank",
            f"{share:.0%}".replace("%", " %"),
            "of the passages shown",
            "ok" if share == 1 else "warn",
        )


def _coverage(coverage: Json) -> Json:
    parts = [f"{layer.get('name')} ({_percent(layer.get('share'))})" for layer in (coverage.get("untracked") or [])[:4]]
    more = len(coverage.get("untracked") or []) - len(parts)
    note = f"of {coverage.get('total', 0):,} parameters"
    if parts:
        note += ", not tracked: " + ", ".join(parts) + (f" and {more} more" if more > 0 else "")
    return _fact("Parameters tracked", _percent(coverage.get("share")), note)


def _power(x: float) -> str:
    """``1.2×10⁻⁷``."""
    mantissa, exponent = f"{x:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{raised}" if x else "0"


def short_name(name: str) -> str:
    """A model's name on the hub as it is, of a path its last part."""
    parts = name.rstrip("/").split("/")
    return name if len(parts) == 2 and all(parts) else parts[-1]


def _percent(share: Any) -> str:
    return f"{share:.1%}".replace("%", " %") if isinstance(share, (int, float)) else "unknown"


def _largest_difference(queries: list[Json], name: str) -> float | None:
    """Of each passage's sum from its score, relative to the query's largest score."""
    errors = []
    for query in queries:
        largest = max((abs(p["score"]) for p in query["passages"]), default=0) or 1
        errors += [
            abs(p["sums"][name] - p["score"]) / largest for p in query["passages"] if p["sums"][name] is not None
        ]
    return max(errors, default=None)


def _method(manifest: Json) -> Iterator[Json]:
    fisher, fit = manifest.get("fisher") or {}, manifest.get("fit") or {}
    if manifest.get("curvature"):
        name = str(manifest["curvature"])
        yield _fact("Curvature", {"ekfac": "EK-FAC", "kfac": "K-FAC"}.get(name, name))
    if manifest.get("damping") is not None:
        damping = str(manifest["damping"])
        note = "the layer's mean eigenvalue" if damping.endswith("x") else ""
        yield _fact("Damping", damping.replace("x", " ×"), note)
    if fisher.get("labels"):
        sampled = fisher["labels"] == "sampled"
        note = (
            f"from the model's own predictions, seed {fisher.get('seed')}"
            if sampled
            else "training labels: for comparison only"
        )
        yield _fact("Fisher labels", fisher["labels"], note, None if sampled else "warn")
    if fit.get("sequences"):
        tokens = f"{fit['tokens']:,} tokens" if fit.get("tokens") else ""
        yield _fact("Factors fitted on", f"{fit['sequences']:,} sequences", tokens)
    if manifest.get("rank") is not None:
        yield _fact("Rank of the scan", str(manifest["rank"]), "the passages shown are rescored at full rank")
    yield _candidates(manifest)


def _candidates(manifest: Json) -> Json:
    kept = manifest.get("candidates")
    if not kept:
        return _fact("Candidates", "all sequences", "no filter before scoring")
    note = str(kept.get("note") or "")
    return _fact(
        "Candidates", f"{kept.get('per_query') or kept.get('kept')} per query", note or "TF-IDF filter before scoring"
    )


def _model(manifest: Json) -> Iterator[Json]:
    model = manifest.get("model") or {}
    if model.get("name"):
        yield _fact("Model", short_name(str(model["name"])), str(model.get("fingerprint") or ""))
    if model.get("parameters"):
        yield _fact("Parameters", f"{model['parameters']:,}")
    if model.get("dtype"):
        scan = model.get("scan_dtype", model["dtype"])
        yield _fact("Precision", str(model["dtype"]), "" if scan == model["dtype"] else f"the scan in {scan}")
    if kernel := manifest.get("kernel") or model.get("attention"):
        yield _fact("Attention kernel", str(kernel), "scores made with another kernel are not comparable")
    if fingerprint := (manifest.get("tokenizer") or {}).get("fingerprint"):
        yield _fact("Tokenizer", str(fingerprint))


def _corpus(manifest: Json) -> Iterator[Json]:
    corpus = manifest.get("corpus") or {}
    if corpus.get("path"):
        yield _fact("Corpus", str(corpus["path"]).rsplit("/", 1)[-1], str(corpus.get("fingerprint") or ""))
    for key in ("documents", "sequences", "tokens"):
        if corpus.get(key):
            yield _fact(key.capitalize(), f"{corpus[key]:,}")
    if manifest.get("scored_sequences"):
        yield _fact("Scored sequences", f"{manifest['scored_sequences']:,}")
    if manifest.get("n_train") and manifest.get("curvature") != "identity":
        yield _fact("N in the nats", f"{manifest['n_train']:,}", "raw score / N = nats per added copy")
    if corpus.get("seq_len"):
        packed = "documents joined end to end" if corpus.get("pack") else "documents never mixed in a window"
        yield _fact("Window", f"{corpus['seq_len']} tokens", packed)
