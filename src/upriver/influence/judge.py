"""How good the solutions are: their energy on sequences that played no part in making them, beside that of the plain gradients.

SCORES/judged/unit-K    energy, best scale and energy at the best scale of some queries: ``solution`` and ``gradient``, ``[Q, 3]``
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from upriver.curvature import energy
from upriver.errors import ModelError, ResourceError
from upriver.influence.job import Job, of_tokens, unseen_rows
from upriver.influence.queries import gradients, in_turn
from upriver.influence.solve import full, told
from upriver.runtime.artifact import Tensors, read_tensors
from upriver.runtime.divide import ALONG_BYTES, JUDGED_TOKENS
from upriver.runtime.plan import held_out_tokens
from upriver.runtime.progress import Say
from upriver.runtime.units import each

NAMES = energy.Judged._fields[0][:-2], energy.Judged._fields[1][:-2], energy.Judged._fields[2][:-2]
SALT = 0x9E3779B9  # so that other sequences are drawn than by the seed alone


def judge(job: Job, seen: np.ndarray, say: Say) -> list[dict[str, Any]]:
    """For each query what its solver says of the solution, and what held-out sequences say: see ``docs/formats.md``.

    Args:
        seen: rows that the solver went over; those that the factors were fitted on count as seen too.
    """
    entries = [
        {"converged": bool(x["converged"]), "why": x.get("why"), "residual": x.get("residual"), "steps": x.get("steps"),
         "products": x.get("products")}
        for x in told(job)
    ]  # fmt: skip
    rows = held_out_rows(job, seen)
    if not len(rows):
        if job.opts.held_out != 0:
            say("held-out energy: not measured, since the solver went over every sequence of the corpus")
        return entries
    if job.division.exact == "bfloat16":
        say("held-out energy: not measured, since the model does not fit in float32")
        return entries
    if not job.division.judged:
        say("held-out energy: not measured, for want of memory; give more with --memory")
        return entries
    chunks = in_turn(len(job.queries), job.division.judged)
    stage = job.open("judged", at_once=job.division.judged, rows=len(rows))
    tokens = int(np.asarray(job.data.lengths_N)[rows].sum())
    with job.progress("judge", tokens * len(chunks)) as advance:

        def compute(unit: int) -> Tensors:
            chunk = chunks[unit]
            q = gradients(job.model, job.layers, job.queries, chunk, job.division.batch_tokens)
            v = full(job, chunk)
            how = {"memory_bytes": ALONG_BYTES, "advance": advance}
            batch_tokens = min(JUDGED_TOKENS, job.division.batch_tokens)
            along = energy.held_out(job.model, job.layers, job.data, rows, [v, q], batch_tokens, **how)
            assert job.curvature is not None
            lambdas = job.curvature.lambdas(job.dampings[0])
            pairs = {
                "solution": energy.judge(q, v, along[0], lambdas),
                "gradient": energy.judge(q, q, along[1], lambdas),
            }
            return {name: torch.stack(list(x), 1).double() for name, x in pairs.items()}

        try:
            files = each(stage, len(chunks), compute)
        except (
            ModelError,
            NotImplementedError,
            ResourceError,
            RuntimeError,
        ) as error:  # no outputs, or no derivative along a direction
            say(f"held-out energy: not measured ({' '.join(str(error).split())[:200]})")
            return entries
    held = {"sequences": len(rows), "tokens": tokens}
    parts = [read_tensors(path) for path in files]
    for entry, solution, gradient in zip(
        entries, *(torch.cat([p[x] for p in parts]) for x in ("solution", "gradient")), strict=True
    ):
        entry |= _numbers(solution) | {"gradient": _numbers(gradient), "held_out": held}
    return entries


def _numbers(judged_3: Tensor) -> dict[str, float]:
    return dict(zip(NAMES, judged_3.tolist(), strict=True))


def held_out_rows(job: Job, seen: np.ndarray) -> np.ndarray:
    """Random sequences that neither the solver nor the fit went over, of as many tokens as judge the solutions."""
    rest = unseen_rows(job.data, job.factors, seen if job.opts.curvature != "identity" else seen[:0])
    tokens = held_out_tokens(job.opts.held_out, len(job.queries))
    return of_tokens(job.data, rest, tokens, [SALT, job.opts.seed or 0])
