"""The trust panel says what the numbers rest on, in words, from the manifest; a fact that is not there is left out."""

from collections.abc import Iterator, Sequence
from typing import Any

from upriver.runtime.config import PLAIN_GRADIENTS
from upriver.show.folder import Json, corpus_name

GOOD, FAIR = 0.95, 0.8  # correlations: above the first fine, below the second a warning
EXACT = 1e-3  # relative difference of a sum that should be equal
SOLVERS = {
    "ekfac": "EK-FAC", "kfac": "K-FAC", "diagonal": "diagonal", "identity": "gradient dot product", "exact": "exact",
    "arnoldi": "Arnoldi", "nystrom": "Nystrom", "cg": "conjugate gradients", "lissa": "LiSSA", "astra": "ASTRA",
    "tracincp": "TracInCP",
}  # fmt: skip


def trust(manifest: Json, queries: list[Json], verified: Json | None = None) -> list[Json]:
    """Collect groups of facts, ``[{title, facts: [{label, value, note, state}]}]``; a state is ``ok``, ``warn`` or null."""
    groups = {
        "Verified": _verified(verified) if verified else (),
        "Checks": _checks(manifest, queries),
        "Solver": _solver(manifest.get("solver") or {}, [q["solution"] for q in queries if q.get("solution")]),
        "Method": _method(manifest),
        "Model": _model(manifest),
        "Versions": (_fact(name, str(v)) for name, v in (manifest.get("versions") or {}).items()),
        "Corpus": _corpus(manifest),
    }
    built = [{"title": title, "facts": list(facts)} for title, facts in groups.items()]
    return [group for group in built if group["facts"]]


def _fact(label: str, value: str, note: str = "", state: str | None = None) -> Json:
    return {"label": label, "value": value, "note": note, "state": state}


def _verified(found: Json) -> Iterator[Json]:
    """Show how what was predicted of the passages agrees with what was measured."""
    how = {
        "proximal": "a proximal step with one more copy of the passage",
        "finetune": "a gradient step on the passage",
    }
    shown, random = found["shown"], found["random"]
    if shown["pearson"] is not None:
        note = f"correlation over {shown['pairs']:,} passages shown, measured with {how[found['how']]}"
        note += f" (largest residual {figure(found['residual'], 2)})" if found["residual"] is not None else ""
        yield _graded("Predicted against realised", shown["pearson"], note)
        note = "of the passages shown, for each nat predicted; at 1 the nats are calibrated"
        yield _fact("Realised", figure(shown["scale"], 2), note)
    if shown["size"] and random["size"] is not None:
        note = f"of what those shown do, over {random['pairs']:,} pairs with a question"
        yield _fact("Random passages", _percent(random["size"] / shown["size"]), note)


def _graded(label: str, entry: Any, note: str) -> Json:
    """Show a correlation by its mean, with the worst case in the note."""
    mean, worst = (entry.get("mean"), entry.get("worst")) if isinstance(entry, dict) else (entry, None)
    note = str(entry.get("what") or note) if isinstance(entry, dict) else note
    if not isinstance(mean, (int, float)):
        return _fact(label, "not measured", note)
    state = "ok" if mean >= GOOD else "warn" if mean < FAIR else None
    return _fact(label, f"{mean:.3f}", f"{note}; worst {worst:.3f}" if isinstance(worst, (int, float)) else note, state)


def _checks(manifest: Json, queries: list[Json]) -> Iterator[Json]:
    if coverage := manifest.get("coverage"):
        untracked = coverage.get("untracked") or []
        parts = [f"{layer.get('name')} ({_percent(layer.get('share'))})" for layer in untracked[:4]]
        more = f" and {len(untracked) - len(parts)} more" if len(untracked) > len(parts) else ""
        note = f"of {coverage.get('total', 0):,} parameters"
        note += ", not tracked: " + ", ".join(parts) + more if parts else ""
        yield _fact("Parameters tracked", _percent(coverage.get("share")), note)
        if trained := coverage.get("trained"):
            share = _percent(coverage.get("trained_tracked", 0) / trained)
            yield _fact("Of what the adapter trained", share, f"of {trained:,} parameters")
    halves = (manifest.get("fit") or {}).get("halves")
    if halves is not None:
        yield _graded("Convergence of the factors", halves, "correlation between the two halves of the fitting sample")
    if manifest.get("rank_error") is not None:
        full = manifest.get("rank") == "full"
        name = "Scan against rescoring" if full else f"Rank {manifest.get('rank', '')} against full rank"
        yield _graded(name, manifest["rank_error"], "correlation of the compressed scan with the full-rank scores")
    for name, what in (("tokens", "Sum over tokens"), ("layers", "Sum over layers")):
        errors = []  # of each passage's sum from its score, relative to the query's largest score
        for query in queries:
            largest = max((abs(p["score"]) for p in query["passages"]), default=0) or 1
            sums = [(p["sums"][name], p["score"]) for p in query["passages"] if p["sums"][name] is not None]
            errors += [abs(total - score) / largest for total, score in sums]
        if errors:
            state, note = "ok" if max(errors) <= EXACT else "warn", "largest relative difference in the passages shown"
            yield _fact(f"{what} = score", _power(max(errors)), note, state)
    rescored = [bool(p["rescored"]) for q in queries for p in q["passages"] if p["rescored"] is not None]
    if rescored:
        share = f"{sum(rescored) / len(rescored):.0%}".replace("%", " %")
        yield _fact("Rescored at full rank", share, "of the passages shown", "ok" if all(rescored) else "warn")


def _solver(solver: Json, solutions: list[Json]) -> Iterator[Json]:
    """Say who solved the queries, whether that converged, and how good the solutions are on sequences they have not seen."""
    if solver.get("name"):
        passes = f"{solver['passes']:.3g} passes over its sample" if solver.get("passes") is not None else ""
        note = "; ".join(filter(None, (str(solver.get("lambda_rule") or ""), passes)))
        several = f", three dampings combined on {solver['combine']:,} tokens" if solver.get("combine") else ""
        yield _fact("Solver", solver_name(solver["name"], solver.get("refine")) + several, note)
    outcomes = [s for s in solutions if s.get("converged") is not None] or [s for s in (solver,) if "converged" in s]
    if outcomes:
        failed = [s for s in (*outcomes, solver) if s.get("converged") is False]
        steps = max((s.get("steps") or 0 for s in outcomes), default=0)
        residuals = [s["residual"] for s in outcomes if s.get("residual") is not None]
        note = "; ".join(dict.fromkeys(str(s["why"]) for s in failed if s.get("why")))
        details = f"at most {steps:,} steps" if steps else ""
        details += (", " if details else "") + f"largest residual {_power(max(residuals))}" if residuals else ""
        value = f"{sum(bool(s['converged']) for s in outcomes)} of {len(outcomes)} questions"
        value = "yes" if not failed else "no" if len(outcomes) == 1 else value
        yield _fact("Converged", value, note or details, "warn" if failed else "ok")
    judged = [(held_out(s), s.get("held_out") or {}) for s in solutions]
    judged = [(energies, size) for energies, size in judged if energies]
    if judged:
        own, plain, scales = zip(*(energies for energies, _ in judged), strict=True)
        gains = [(x - y) / max(abs(y), 1e-30) for x, y in zip(own, plain, strict=True)]
        state = (
            "warn" if min(gains) < -EXACT else "ok" if min(gains) > EXACT else None
        )  # None: it is the gradient itself
        sequences, tokens = (judged[0][1].get(key) or 0 for key in ("sequences", "tokens"))
        note = f"at the best scale, on {sequences:,} sequences ({tokens:,} tokens) that played no part"
        yield _fact("Held-out energy, solution", _span(own), note, state)
        yield _fact("Held-out energy, plain gradient", _span(plain), "the higher, the nearer to the true solution")
        note = "nats are shown times the scale of their question: so they are calibrated"
        yield _fact("Best scale", _span(scales, 2), note)


def held_out(solution: Json | None) -> tuple[float, float, float] | None:
    """Find the held-out energies of a solution and of the plain gradient, at their best scales, and the solution's scale."""
    gradient = (solution or {}).get("gradient") or {}
    found = [(solution or {}).get("best_energy"), gradient.get("best_energy"), (solution or {}).get("best_scale")]
    return (found[0], found[1], found[2]) if all(isinstance(x, (int, float)) for x in found) else None


def solver_name(name: Any, refine: Any = None) -> str:
    """Name the solver in words, such as ``EK-FAC + 3 CG steps``."""
    words = SOLVERS.get(str(name), str(name))
    if refine == "auto":
        return f"{words} + CG steps until the held-out energy no longer rises"
    return f"{words} + {refine} CG step{'s' if refine != 1 else ''}" if refine else words


def figure(x: float, digits: int = 3) -> str:
    """Write a number in ``digits`` digits, the last ones even where they are zero: ``341``, ``11.5``, ``0.30``."""
    return f"{x:,.0f}" if abs(x) >= 10**digits else f"{x:#.{digits}g}".rstrip(".")


def _span(values: Sequence[float], digits: int = 3) -> str:
    ends = list(dict.fromkeys(figure(x, digits) for x in (min(values), max(values))))
    return " to ".join(ends)


def _power(x: float) -> str:
    """Write a number as a power of ten, such as ``1.2×10⁻⁷``."""
    mantissa, exponent = f"{x:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{raised}" if x else "0"


def short_name(name: str) -> str:
    """Keep a model's name on the hub as it is, and of a path its last part."""
    parts = name.rstrip("/").split("/")
    return name if len(parts) == 2 and all(parts) else parts[-1]


def _percent(share: Any) -> str:
    return f"{share:.1%}".replace("%", " %") if isinstance(share, (int, float)) else "unknown"


def _method(manifest: Json) -> Iterator[Json]:
    fisher, fit, kept = (manifest.get(key) or {} for key in ("fisher", "fit", "candidates"))
    if manifest.get("curvature") and not manifest.get("solver"):
        yield _fact("Curvature", solver_name(manifest["curvature"]))
    damping = manifest.get("damping")
    if damping is not None:
        damping = ", ".join(map(str, damping)) if isinstance(damping, list) else str(damping)
        note = "the layer's mean eigenvalue" if damping.endswith("x") else ""
        yield _fact("Damping", damping.replace("x", " ×"), note)
    if labels := fisher.get("labels"):
        notes = {
            "sampled": f"from the model's own predictions, seed {fisher.get('seed')}"
            + (f", mean over {fisher['draws']} draws" if fisher.get("draws", 1) > 1 else ""),
            "exact": "all of them, weighted by the model's own predictions",
        }
        note = notes.get(labels, "training labels: for comparison only")
        yield _fact("Fisher labels", labels, note, None if labels in notes else "warn")
    if fit.get("sequences"):
        notes = [f"{fit['tokens']:,} tokens"] if fit.get("tokens") else []
        notes += [f"A and S in {fit['blocks']} diagonal blocks"] if fit.get("blocks", 1) > 1 else []
        yield _fact("Factors fitted on", f"{fit['sequences']:,} sequences", ", ".join(notes))
    if manifest.get("rank") is not None:
        yield _fact("Rank of the scan", str(manifest["rank"]), "the passages shown are rescored at full rank")
    some = (
        f"{kept.get('per_query') or kept.get('kept')} per query",
        str(kept.get("note") or "TF-IDF filter before scoring"),
    )
    yield _fact("Candidates", *(some if kept else ("all sequences", "no filter before scoring")))


def _model(manifest: Json) -> Iterator[Json]:
    model = manifest.get("model") or {}
    if name := model.get("name"):
        yield _fact("Model", short_name(str(name)), str(model.get("fingerprint") or ""))
    if model.get("parameters"):
        yield _fact("Parameters", f"{model['parameters']:,}")
    if dtype := model.get("dtype"):
        others = {
            "the scan": model.get("scan_dtype", dtype),
            "questions and the second look": model.get("exact_dtype", dtype),
        }
        more = ", ".join(f"{what} in {kind}" for what, kind in others.items() if kind != dtype)
        yield _fact("Precision", str(dtype), more)
    if kernel := manifest.get("kernel") or model.get("attention"):
        yield _fact("Attention kernel", str(kernel), "scores made with another kernel are not comparable")
    if fingerprint := (manifest.get("tokenizer") or {}).get("fingerprint"):
        yield _fact("Tokenizer", str(fingerprint))


def _corpus(manifest: Json) -> Iterator[Json]:
    corpus = manifest.get("corpus") or {}
    if name := corpus_name(corpus):
        yield _fact("Corpus", name, str(corpus.get("fingerprint") or ""))
    for key in ("documents", "sequences", "tokens"):
        if corpus.get(key):
            yield _fact(key.capitalize(), f"{corpus[key]:,}")
    if manifest.get("scored_sequences"):
        yield _fact("Scored sequences", f"{manifest['scored_sequences']:,}")
    if manifest.get("n_train") and manifest.get("curvature") not in PLAIN_GRADIENTS:
        whose = {"given": "as given with --n-train", "factors": "sequences of the corpus of the factors"}.get(
            str(manifest.get("n_train_from")), "sequences of the corpus"
        )
        yield _fact("N in the nats", f"{manifest['n_train']:,}", f"{whose}; raw score / N = nats per added copy")
    if corpus.get("seq_len"):
        packed = "documents joined end to end" if corpus.get("pack") else "documents never mixed in a window"
        yield _fact("Window", f"{corpus['seq_len']} tokens", packed)
