"""The manifest of a finished trace."""

import sys
from importlib.metadata import version
from typing import Any

from upriver.influence.passages import Ranked
from upriver.influence.stages import Job
from upriver.model.losses import LanguageModel
from upriver.runtime.config import CONVENTIONS, MEASURED, POSITIVE
from upriver.runtime.progress import Times
from upriver.text.tokenise import tokenizer_fingerprint


def manifest(job: Job, found: Ranked, kept: dict[str, Any] | None, times: Times) -> dict[str, Any]:
    """What a trace was made from, how, and how far it can be trusted: ``manifest.json``; see ``docs/formats.md``."""
    factors, opts, model = job.factors.manifest, job.opts, job.model
    fitted, known = job.factors.options, [x for x in found.agreement if x is not None]
    return {
        "upriver": version("upriver"),
        "stage": "trace",
        "model": {
            "name": model.name,
            "fingerprint": job.stage.key["model"],
            "parameters": factors["coverage"]["total"],
            "dtype": fitted.dtype,
            "scan_dtype": job.scan_dtype,
            **model.info | {"attention": model.attention, "positions": model.positions},
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(model.tokenizer)} if model.tokenizer else None,
        "corpus": getattr(job.data, "info", {"sequences": len(job.data), "fingerprint": job.data.fingerprint}),
        "n_train": len(job.data),
        "scored_sequences": len(job.rows),
        "candidates": kept,
        "coverage": factors["coverage"],
        "layers": factors["layers"],
        "curvature": opts.curvature,
        "damping": "none" if opts.curvature == "identity" else opts.damping,
        "fisher": {"labels": fitted.fisher, "seed": fitted.seed},
        "fit": factors["fit"],
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
        "timings": dict(times) | {"scan_tokens": int(job.data.lengths_N[job.rows].sum())},
    }
