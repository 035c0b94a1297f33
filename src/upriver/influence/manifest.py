"""The manifest of a finished trace."""

import sys
from importlib.metadata import version
from typing import Any

from upriver.influence.passages import Ranked
from upriver.influence.solve import Job
from upriver.model.losses import LanguageModel
from upriver.runtime.config import CONVENTIONS, MEASURED, POSITIVE
from upriver.text.tokenise import tokenizer_fingerprint

LAMBDA = "a share of the mean eigenvalue of each layer, or absolute"


def manifest(
    job: Job,
    found: Ranked,
    kept: dict[str, Any] | None,
    coverage: dict[str, Any],
    solutions: list[dict[str, Any]],
    scan_dtype: str,
    times: dict[str, float],
) -> dict[str, Any]:
    """What a trace was made from, how, and how far it can be trusted: ``manifest.json``; see ``docs/formats.md``."""
    opts, model, known = job.opts, job.model, [x for x in found.agreement if x is not None]
    fitted, factors = (job.factors.options, job.factors.manifest) if job.factors else (None, None)
    why = next((x["why"] for x in solutions if x.get("why")), None)
    return {
        "upriver": version("upriver"),
        "stage": "trace",
        "model": {
            "name": model.name,
            "fingerprint": job.stage.key["model"],
            "parameters": coverage["total"],
            "dtype": fitted.dtype if fitted else str(model.dtype).removeprefix("torch."),
            "scan_dtype": scan_dtype,
            **model.info | {"attention": model.attention, "positions": model.positions},
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(model.tokenizer)} if model.tokenizer else None,
        "corpus": getattr(job.data, "info", {"sequences": len(job.data), "fingerprint": job.data.fingerprint}),
        "n_train": job.n_train or len(job.data),
        "scored_sequences": len(job.rows),
        "candidates": kept,
        "coverage": coverage,
        "layers": [x.told() for x in job.layers],
        "curvature": opts.curvature,
        "solver": {
            "name": opts.curvature,
            "refine": opts.refine,
            "converged": all(x["converged"] for x in solutions),
            "why": why,
            "passes": max((x.get("products") or 0.0 for x in solutions), default=0.0),
            "lambda_rule": LAMBDA,
        },
        "damping": opts.damping if job.n_train else "none",
        "fisher": {"labels": fitted.fisher, "seed": fitted.seed} if fitted else None,
        "fit": factors["fit"] if factors else None,
        "rank": opts.rank,
        "rank_error": {
            "mean": sum(known) / len(known) if known else None,
            "worst": min(known) if known else None,
            "what": "correlation of the scan's scores with full-rank scores on random sequences, over queries",
        },
        "top": opts.top,
        "kernel": model.attention,
        "checks": {"token_sum": found.token_sum},
        "conventions": CONVENTIONS,
        "sign": POSITIVE if isinstance(model.task, LanguageModel) else MEASURED,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": sys.version.split()[0]},
        "timings": times | {"scan_tokens": int(job.data.lengths_N[job.rows].sum())},
    }
