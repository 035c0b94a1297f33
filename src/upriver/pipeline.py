"""The main path: solve the queries, stream the corpus past them, look again at the top, write it down."""

from pathlib import Path
from typing import Any

import numpy as np

from upriver.curvature.factors import Factors
from upriver.curvature.fit import fit_diagonal
from upriver.errors import QueryError
from upriver.influence.gradients import Measured
from upriver.influence.manifest import manifest
from upriver.influence.passages import Ranked, answers, ranked, top_rows
from upriver.influence.results import write_scores, write_top
from upriver.influence.scanned import Scanned, extremes, random_rows
from upriver.influence.stages import Job, Part, divide, rescore_stage, scan_stage, solve_stage
from upriver.model.calibrate import announce
from upriver.model.fingerprint import measured_by
from upriver.model.layers import Coverage
from upriver.model.load import Model
from upriver.model.memory import DIVISION
from upriver.model.sweep import check_length, tracked_layers
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, digest, discard, locked, write_json
from upriver.runtime.config import CONVENTIONS, TraceOptions, options
from upriver.runtime.passes import Request, request_for
from upriver.runtime.progress import Progress, Say, Times, mute, silent
from upriver.runtime.system import give_back, work_ended
from upriver.show.report import is_report
from upriver.show.scores import Scores
from upriver.text.batch import Sequences
from upriver.text.candidates import candidates
from upriver.text.corpus import Corpus
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
        stage = Artifact.open(out, "trace", key, overwrite, is_report)
        if stage.done:
            dist.on_first(lambda: _tidy(out))  # a kill may have come between the two
            say(f"scores: {out} is complete and was made from the same inputs; used as it is")
            say(f"layers: {Coverage.of(factors.manifest['coverage']).line()}")
        else:
            _run(stage, model, corpus, queries, factors, opts, progress, say)
            work_ended()
    return Scores(out)


def _run(
    stage: Artifact,
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
        announce(say, exact, layers, corpus, _request(job), split)
        with times("queries"):
            solved = solve_stage(job)
            give_back()
        scanned = _scanned(job, solved, times, say)
        give_back()
        ends, sample = extremes(scanned, opts.top), random_rows(scanned, fitted.seed)
        wanted = [np.union1d(rows_q, sample) for rows_q in ends]
        with times("rescore"):
            parts = rescore_stage(job, wanted)
        dist.on_first(lambda: _publish(job, scanned, ranked(job, scanned, ends, sample, parts), parts, kept, times))


def _scanned(job: Job, solved: list[Path], times: Times, say: Say) -> Scanned:
    """The scan, in its own type: a copy of the model ends with it."""
    with job.model.computing_in(job.scan_dtype) as computing:
        layers = job.layers
        if computing is not job.model:
            layers = tracked_layers(computing, job.data, job.factors.options.layers)
        with times("scan"):
            return scan_stage(job._replace(model=computing, layers=layers), solved, say)


def _publish(
    job: Job, scanned: Scanned, found: Ranked, parts: list[Part], kept: dict[str, Any] | None, times: Times
) -> None:
    """Write the results; the manifest last."""
    job.factors.check_unchanged()
    folder = job.stage.path
    write_scores(folder, job.data, job.queries.ids, scanned)
    write_top(folder, top_rows(job, found.shown, parts))
    write_json(folder / "queries.json", answers(job.model, job.queries, found.agreement))
    job.stage.finish(manifest(job, found, kept, times))
    _tidy(folder)


def _request(job: Job) -> Request:
    """What is planned of the trace."""
    opts = job.opts
    return request_for(
        job.data.lengths_N[job.rows], fit=False, queries=len(job.queries), rank=job.rank, top=opts.top, scan_dtype=job.scan_dtype,
        query_tokens=max(1, round(float(np.mean(job.queries.lengths)))), batch_tokens=opts.batch_tokens,
        layer_scores=opts.layer_scores,
    )  # fmt: skip


def _tidy(folder: Path) -> None:
    """Remove what the stages left: all that counts of it is in the tables."""
    for name in ("solved", "scan", "rescored"):
        discard(folder / name)
    (folder / DIVISION).unlink(missing_ok=True)


def _candidates(
    corpus: Sequences, queries: Measured, per_query: int | None
) -> tuple[np.ndarray, dict[str, Any] | None]:
    if per_query is None:
        return np.arange(len(corpus)), None
    if not isinstance(corpus, Corpus) or not isinstance(queries, Queries):
        raise QueryError("candidates are chosen by words: leave out --candidates for a task that has no text")
    return candidates(corpus, queries, per_query)
