"""The main path: solve the queries, stream the corpus past them, look again at the top, write it down."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upriver.curvature.diagonal import fit_diagonal
from upriver.curvature.factors import Factors
from upriver.errors import ConfigError, QueryError
from upriver.influence.forecast import divide, request, scan_probe
from upriver.influence.job import Checkpoint, Given, Job, exactly, jobs, loaded, settled_options
from upriver.influence.judge import judge
from upriver.influence.normed import query_energies
from upriver.influence.passages import answers, manifest, ranked, top_rows
from upriver.influence.queries import Measured, check_queries
from upriver.influence.rescore import Pairs, rescore_top
from upriver.influence.results import write_scores, write_top
from upriver.influence.scan import Part, Scanned, scan, scan_units
from upriver.influence.solve import solve
from upriver.model.check import check_data
from upriver.model.coverage import Coverage, coverage
from upriver.model.fingerprint import measured_by
from upriver.model.model import Model, check_model
from upriver.model.planned import announce, division_file, plan_here
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, discard, locked, write_json
from upriver.runtime.config import CONVENTIONS, TraceOptions, options
from upriver.runtime.device import float32_products, memory_told
from upriver.runtime.progress import Progress, Say, Times, mute, silent
from upriver.runtime.system import give_back, work_ended
from upriver.show.report import is_report
from upriver.show.scores import Scores
from upriver.text.batch import Sequences
from upriver.text.candidates import candidates
from upriver.text.corpus import Corpus
from upriver.text.examples import sequences
from upriver.text.queries import Queries


def trace(
    model: Model,
    corpus: Any,
    queries: Measured,
    factors: Factors | None = None,
    out: str | Path | None = None,
    *,
    checkpoints: Sequence[Checkpoint] = (),
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> Scores:
    """Score every sequence of ``corpus`` by its influence on every query, and look again at the most influential.

    Args:
        corpus: as for :func:`upriver.fit`.
        factors: of the fit; None for a curvature that needs none (``identity``, ``exact``, ``arnoldi``, ``nystrom``, ``cg``,
            ``lissa``, ``tracincp``).
        checkpoints: for ``tracincp``: models (or their folders) with the learning rate that each was trained with.
        given: ``curvature``, ``refine``, ``rank``, ``damping``, ``top``, ``candidates``, ``layer_scores``, ``unit_norm``,
            ``dtype`` (of the scan), ``tf32``, ``batch_tokens``, ``memory``, and more; see :class:`TraceOptions`.

    Returns:
        The results in ``out``: raw scores are ``I_f`` (eq. 25); divided by the number of training sequences they are nats.

    Raises:
        InputError: an option, a query, or the folder cannot be used; the factors belong to another model.
        NumericalError: a NaN or an infinity on the way.
        ResourceError: the memory of the device ran out.

    Example:
        >>> result = up.trace(model, corpus, up.Queries.read("queries.jsonl", model.tokenizer), factors, out="scores")
        >>> result.top("q1", 10)
    """
    check_model(model)
    if out is None:
        raise ConfigError("the trace has no folder for its results: got out=None; give one, such as out='scores'")
    if isinstance(queries, Queries):
        queries = queries.bound(model.tokenizer, model.longest)
    corpus = sequences(corpus)
    opts = settled_options(options(TraceOptions, given), model, factors, checkpoints)
    asked, out = Given(model, corpus, queries, factors, opts, checkpoints, progress, say), Path(out)
    if factors:
        factors.check(model)
    check_data(model, corpus)
    if isinstance(queries, Queries):
        check_queries(model, queries)
    key = {
        "model": factors.manifest["key"]["model"] if factors else model.fingerprint,  # which has been checked
        "corpus": corpus.fingerprint,
        "queries": queries.fingerprint,
        "factors": factors and factors.fingerprint,
        "checkpoints": [[loaded(which, model).fingerprint, weight] for which, weight in checkpoints],
        "kernel": model.attention,
        "options": opts.key(),
        "measurement": measured_by(model.task),
        "conventions": CONVENTIONS,
    }
    with locked(out), memory_told("the trace", opts.batch // 2), float32_products(bool(opts.tf32)):
        stage = Artifact.open(out, "trace", key, overwrite, is_report)
        if stage.done:
            dist.on_first(lambda: _tidy(out))  # a kill may have come between the two
            say(f"scores: {out} is complete and was made from the same inputs; used as it is")
            say(f"layers: {Coverage.of(stage.manifest['coverage']).line()}")
        else:
            with model.task_kept():
                _run(stage, asked)
            work_ended()
    return Scores(out)


def _run(stage: Artifact, asked: Given) -> None:
    times, opts, data, say = Times(), asked.opts, asked.data, asked.say
    rows, kept = _candidates(data, asked.queries, opts.candidates)
    if opts.curvature == "diagonal" and asked.factors:
        fitted = asked.factors.manifest["fit"]["tokens"]
        say(f"diagonal: measured once, on the {fitted:,} tokens that the factors were fitted on")
        fit_diagonal(asked.model, data, asked.factors, opts.memory, asked.progress)
    job = _first(stage, asked, rows)
    if len(set(job.table)) < len(job.table):
        raise QueryError(
            f"a question is named as a column of another one: got {', '.join(job.table)}; name it without '@'"
        )
    cover = asked.factors.manifest["coverage"] if asked.factors else _coverage(job)
    say(f"layers: {Coverage.of(cover).line()}")
    if asked.factors and asked.factors.manifest["key"]["corpus"] != data.fingerprint:
        n_train, whose = job.n_train or 0, "the given" if opts.n_train else "its"
        nats = f"; nats are those of a copy among {whose} {n_train:,} sequences" if n_train else ""
        say(f"note: the factors were fitted on another corpus{nats}")
    seen = int(np.asarray(data.lengths_N)[asked.sample].sum(dtype=np.int64))
    wanted_of = request(data, rows, asked.queries, opts, job.layers, seen)
    probes = {"scan": scan_probe(wanted_of.asked)}
    announce(say, lambda: plan_here(asked.model, job.layers, data, wanted_of, probes, job.division))
    parts: list[Part] = []
    energy_Q = None
    for each_job in jobs(job, asked):
        with times("queries"), exactly(each_job, asked) as solving:
            solved = solve(solving)
            energy_Q = query_energies(solving) if opts.unit_norm else None
            give_back()
        with times("scan"), each_job.model.computing_in(str(opts.dtype)) as computing:
            own = computing.module is each_job.model.module
            layers = each_job.layers if own else asked.tracked(computing, each_job.layers)
            parts += scan(each_job._replace(model=computing, layers=layers, curvature=solving.curvature), solved, say)
            give_back()
    n_layers = len(job.layers) if opts.layer_scores else None
    scanned = Scanned(scan_units(job), parts, len(job.columns), n_layers, energy_Q)
    ends, sample = scanned.extremes(opts.top, len(asked.queries)), scanned.random_rows(int(opts.seed or 0))
    wanted = [np.union1d(rows_q, sample) for rows_q in ends]
    looked: list[list[Pairs]] = []
    judged: list[dict[str, Any]] = []
    for each_job in jobs(job, asked):
        with exactly(each_job, asked) as looking:
            with times("rescore"):
                looked.append(rescore_top(looking, wanted))
            with times("judging"):
                judged = [{"converged": True}] * len(ends) if asked.checkpoints else judge(looking, asked.seen, say)
    pairs = [Pairs(some[0].queries, [part for p in some for part in p.parts]) for some in zip(*looked, strict=True)]

    def publish() -> None:
        """Write the results; the manifest last."""
        if asked.factors:
            asked.factors.check_unchanged()
        found = ranked(job, scanned, ends, sample, pairs)
        write_scores(stage.path, data, job.columns, scanned)
        write_top(stage.path, top_rows(job, found.shown, pairs, judged))
        write_json(stage.path / "queries.json", answers(job.model, asked.queries, found.agreement, judged))
        stage.finish(manifest(job, found, kept, cover, judged, str(opts.dtype), times))
        _tidy(stage.path)

    with exactly(job, asked) as job:
        dist.on_first(publish)


def _first(stage: Artifact, asked: Given, rows: np.ndarray) -> Job:
    """The work on the model itself, divided so that it stays within the memory."""
    layers = asked.tracked(asked.model)
    division = divide(asked, layers, stage.path)
    given = (asked.model, layers, asked.data, asked.queries, asked.factors, rows, asked.opts, asked.progress)
    return Job(stage, *given, division)


def _coverage(job: Job) -> dict[str, Any]:
    found = coverage(job.model.module, job.layers)
    return found._asdict() | {"share": found.share}


def _tidy(folder: Path) -> None:
    """Remove what the stages left: all that counts of it is in the tables."""
    for name in ("solution", "solved", "norms", "scan", "rescored", "judged"):
        discard(folder / name)
    division_file(folder).unlink(missing_ok=True)


def _candidates(
    corpus: Sequences, queries: Measured, per_query: int | None
) -> tuple[np.ndarray, dict[str, Any] | None]:
    if per_query is None:
        return np.arange(len(corpus)), None
    if not isinstance(corpus, Corpus) or not isinstance(queries, Queries):
        raise QueryError("candidates are chosen by words: leave out --candidates for a task that has no text")
    return candidates(corpus, queries, per_query)
