"""The main path: fit the curvature, solve the queries, stream the corpus past them, look again at the top, write it down."""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from upriver.curvature.factors import Factors
from upriver.curvature.fit import fit_diagonal
from upriver.errors import QueryError
from upriver.influence.gradients import Measured
from upriver.influence.passages import Ranked, answers, ranked, top_rows
from upriver.influence.results import write_scores, write_top
from upriver.influence.scanned import Scanned, extremes, random_rows
from upriver.influence.stages import Job, Part, divide, rescore_stage, scan_stage, solve_stage
from upriver.model.calibrate import plan_here
from upriver.model.fingerprint import measured_by
from upriver.model.generate import greedy
from upriver.model.layers import Coverage
from upriver.model.load import Model
from upriver.model.memory import DIVISION
from upriver.model.sweep import check_length, tracked_layers
from upriver.runtime import dist
from upriver.runtime.config import CONVENTIONS, POSITIVE, TraceOptions, options
from upriver.runtime.hardware import give_back, work_ended
from upriver.runtime.passes import request_for
from upriver.runtime.plan import describe
from upriver.runtime.progress import Progress, Say, Times, mute, silent
from upriver.runtime.store import Stage, digest, locked, write_json
from upriver.show.scores import Scores
from upriver.text.batch import Sequences
from upriver.text.candidates import candidates
from upriver.text.corpus import Corpus
from upriver.text.encode import tokenizer_fingerprint
from upriver.text.queries import Queries


def trace(
    model: Model,
    corpus: Sequences,
    queries: Measured,
    factors: Factors,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> Scores:
    """Score every sequence of ``corpus`` by its influence on every query, and look again at the most influential.

    Args:
        given: ``rank``, ``damping``, ``top``, ``candidates``, ``curvature``, ``layer_scores``, ``dtype`` (of the scan),
            ``batch_tokens``, ``memory``; see :class:`TraceOptions`.

    Returns:
        The results in ``out``: raw scores are ``I_f`` (eq. 25); divided by the number of training sequences they are nats.

    Raises:
        InputError: an option, a query, or the folder cannot be used; the factors belong to another model.
        NumericalError: a NaN or an infinity on the way.

    Example:
        >>> result = up.trace(model, corpus, up.Queries.read("queries.jsonl", model.tokenizer), factors, out="scores")
        >>> result.top("q1", 10)
    """
    opts, out = options(TraceOptions, given), Path(out)
    if isinstance(queries, Queries):
        queries = queries.bound(model.tokenizer, model.longest)
    factors.check(model)
    check_length(model, corpus)
    key = {
        "model": factors.manifest["key"]["model"],  # which has been checked: hashing a large model again takes seconds
        "corpus": corpus.fingerprint,
        "queries": queries.fingerprint,
        "factors": digest([factors.manifest["key"], factors.manifest["fit"]["tokens"]]),  # until may end at any of some
        "options": opts.key() | {"dtype": opts.dtype or factors.options.dtype},
        "measurement": measured_by(model.task),
        "conventions": CONVENTIONS,
    }
    with locked(out):
        stage = Stage.open(out, "trace", key, overwrite)
        if stage.done:
            dist.lead(lambda: _tidy(out))  # a kill may have come between the two
            say(f"scores: {out} is complete and was made from the same inputs; used as it is")
        else:
            _run(stage, model, corpus, queries, factors, opts, progress, say)
            work_ended()
    return Scores(out)


def _run(
    stage: Stage,
    model: Model,
    corpus: Sequences,
    queries: Measured,
    factors: Factors,
    opts: TraceOptions,
    progress: Progress,
    say: Say,
) -> None:
    times = Times()
    fitted = factors.options
    say(f"layers: {Coverage.of(factors.manifest['coverage']).line()}")
    if opts.curvature == "diagonal":
        say(
            f"diagonal: measured once, on the {factors.manifest['fit']['tokens']:,} tokens that the factors were fitted on"
        )
        fit_diagonal(model, corpus, factors, opts.memory, progress)
    rows, kept = _candidates(corpus, queries, opts.candidates)
    with model.computing_in("float64" if fitted.dtype == "float64" else "float32") as exact:
        layers = tracked_layers(exact, corpus, fitted.layers)
        scan_dtype = opts.dtype or fitted.dtype
        split = divide(exact, layers, corpus, queries, opts, scan_dtype, stage.path, say)
        job = Job(stage, exact, layers, corpus, queries, factors, rows, opts, progress, split)
        if say is not mute:
            _announce(job, scan_dtype, say)
        with times("queries"):
            solved = solve_stage(job)
            give_back()
        with exact.computing_in(scan_dtype) as computing:
            if computing is not exact:
                layers = tracked_layers(computing, corpus, fitted.layers)
            scanning = job._replace(model=computing, layers=layers)
            with times("scan"):
                scanned = scan_stage(scanning, solved, say)
                give_back()
        ends, sample = extremes(scanned, opts.top), random_rows(scanned, fitted.seed)
        wanted = [np.union1d(rows_q, sample) for rows_q in ends]
        with times("rescore"):
            parts = rescore_stage(job, wanted)
        dist.lead(lambda: _publish(job, scanned, ranked(job, scanned, ends, sample, parts), parts, kept, times))


def _publish(
    job: Job, scanned: Scanned, found: Ranked, parts: list[Part], kept: dict[str, Any] | None, times: Times
) -> None:
    """Write the results; the manifest last."""
    folder = job.stage.path
    write_scores(folder, job.data, job.queries.ids, scanned)
    write_top(folder, top_rows(job, found.shown, parts))
    write_json(folder / "queries.json", answers(job.model, job.queries, found.agreement))
    job.stage.finish(_manifest(job, found, kept, times))
    _tidy(folder)


def _announce(job: Job, dtype: str, say: Say) -> None:
    """What the trace will take, from a few seconds of measuring."""
    opts = job.opts
    request = request_for(
        job.data.lengths_N[job.rows], fit=False, queries=len(job.queries), rank=job.rank, top=opts.top, scan_dtype=dtype,
        query_tokens=max(1, round(float(np.mean(job.queries.lengths)))), batch_tokens=opts.batch_tokens,
        layer_scores=opts.layer_scores,
    )  # fmt: skip
    for line in describe(plan_here(job.model, job.layers, job.data, request, job.split.made_for)):
        say(line)


def _tidy(folder: Path) -> None:
    """Remove what the stages left: all that counts of it is in the tables."""
    for name in ("solved", "scan", "rescored"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / DIVISION).unlink(missing_ok=True)


def _candidates(
    corpus: Sequences, queries: Measured, per_query: int | None
) -> tuple[np.ndarray, dict[str, Any] | None]:
    if per_query is None:
        return np.arange(len(corpus)), None
    if not isinstance(corpus, Corpus) or not isinstance(queries, Queries):
        raise QueryError("candidates are chosen by words: leave out --candidates for a task that has no text")
    return candidates(corpus, queries, per_query)


def complete(model: Model, queries: Queries, most: int) -> Queries:
    """Queries without a completion get the model's own greedy answer of at most ``most`` tokens, marked as such.

    Raises:
        QueryError: a prompt has no token, or prompt and answer together could be longer than the model takes.
    """
    answers, longest = {}, model.longest
    for i in queries.needs_completion:
        tokens_T, query = queries.prompt_tokens(i), queries.records[i]
        if not len(tokens_T):
            raise QueryError(
                f"{query.where}: the prompt of query {query.id!r} has no token that the model could go on from: "
                f"got {query.prompt!r}; write more of it, or give a completion"
            )
        if longest and len(tokens_T) + most > longest:
            raise QueryError(
                f"the prompt of query {query.id!r} leaves no room for an answer: got {len(tokens_T)} tokens and {most} "
                f"of the answer, the model takes {longest}; shorten one of them"
            )
        answers[query.id] = greedy(model, tokens_T, most)
    return queries.completed(answers)


def _manifest(job: Job, found: Ranked, kept: dict[str, Any] | None, times: Times) -> dict[str, Any]:
    factors, opts, model = job.factors.manifest, job.opts, job.model
    fitted, known = job.factors.options, [x for x in found.agreement if x is not None]
    tokens = int(job.data.lengths_N[job.rows].sum())
    return {
        "upriver": version("upriver"),
        "stage": "trace",
        "model": {
            "name": model.name,
            "fingerprint": job.stage.key["model"],
            "parameters": factors["coverage"]["total"],
            "dtype": fitted.dtype,
            "scan_dtype": opts.dtype or fitted.dtype,
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
        "sign": POSITIVE,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": sys.version.split()[0]},
        "timings": dict(times) | {"scan_tokens": tokens, "scan_tokens_per_second": tokens / max(times["scan"], 1e-9)},
    }
