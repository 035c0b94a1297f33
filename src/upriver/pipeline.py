"""The main path: solve the queries, stream the corpus past them, look again at the top, write it down."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upriver.curvature.base import Curvature
from upriver.curvature.choose import needs_factors, solver
from upriver.curvature.factors import Factors
from upriver.curvature.fit import fit_diagonal
from upriver.errors import ConfigError, MismatchError, QueryError
from upriver.influence.forecast import divide, request, scan_probe
from upriver.influence.judge import judge
from upriver.influence.passages import answers, manifest, ranked, top_rows
from upriver.influence.queries import Measured
from upriver.influence.rescore import Pairs, rescore_top
from upriver.influence.results import write_scores, write_top
from upriver.influence.scan import Part, Scanned, scan, scan_units
from upriver.influence.solve import Job, solve
from upriver.model.check import check_length, tracked_layers
from upriver.model.fingerprint import measured_by
from upriver.model.layers import Coverage, Layer, coverage
from upriver.model.load import Model, load_model
from upriver.model.planned import announce, division_file, plan_here
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, digest, discard, locked, write_json
from upriver.runtime.config import CONVENTIONS, PLAIN_GRADIENTS, TraceOptions, options
from upriver.runtime.divide import Division
from upriver.runtime.progress import Progress, Say, Times, mute, silent
from upriver.runtime.system import give_back, work_ended
from upriver.show.report import is_report
from upriver.show.scores import Scores
from upriver.text.batch import Sequences
from upriver.text.candidates import candidates
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries

PRODUCT_TOKENS, MOST_ROOM = 1024, 1 << 30  # of a batch in which products are fastest; bytes that its vectors take
Checkpoint = tuple[str | Path | Model, float]  # a model as it was in training, and its learning rate there


@dataclass(frozen=True)
class Given:
    """What a trace was given, once it has been checked."""

    model: Model
    data: Sequences
    queries: Measured
    factors: Factors | None
    opts: TraceOptions  # with what is not named taken from the factors
    checkpoints: Sequence[Checkpoint]
    progress: Progress
    say: Say

    @property
    def exact(self) -> str:
        """The type in which queries are solved and the top is looked at again."""
        fitted = self.factors.options.dtype if self.factors else self.opts.dtype
        return "float64" if "float64" in (fitted, self.opts.dtype) else "float32"

    def tracked(self, model: Model) -> list[Layer]:
        """The layers of one of the models, their second moments in as many blocks as those of the factors."""
        parts = self.factors.options.blocks if self.factors else 1
        return tracked_layers(model, self.data, str(self.opts.layers), parts)

    @property
    def sample(self) -> np.ndarray:
        """The sequences that a matrix-free solver goes over: those of the fit, or some of as many tokens as are asked for."""
        fitted = (
            self.factors.manifest["fit"]["tokens"] if self.factors else int(self.data.lengths_N.sum(dtype=np.int64))
        )
        return self.data.sample(self.opts.refine_tokens or fitted, self.opts.seed or 0)


def trace(
    model: Model,
    corpus: Sequences,
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
        factors: of the fit; None for a curvature that needs none (``identity``, ``exact``, ``arnoldi``, ``nystrom``, ``cg``,
            ``lissa``, ``tracincp``).
        checkpoints: for ``tracincp``: models (or their folders) with the learning rate that each was trained with.
        given: ``curvature``, ``refine``, ``rank``, ``damping``, ``top``, ``candidates``, ``layer_scores``, ``dtype`` (of the
            scan), ``batch_tokens``, ``memory``, and more; see :class:`TraceOptions`.

    Returns:
        The results in ``out``: raw scores are ``I_f`` (eq. 25); divided by the number of training sequences they are nats.

    Raises:
        InputError: an option, a query, or the folder cannot be used; the factors belong to another model.
        NumericalError: a NaN or an infinity on the way.

    Example:
        >>> result = up.trace(model, corpus, up.Queries.read("queries.jsonl", model.tokenizer), factors, out="scores")
        >>> result.top("q1", 10)
    """
    if out is None:
        raise ConfigError("the trace has no folder for its results: got out=None; give one, such as out='scores'")
    if isinstance(queries, Queries):
        queries = queries.bound(model.tokenizer, model.longest)
    opts = _settled(options(TraceOptions, given), model, factors, checkpoints)
    asked, out = Given(model, corpus, queries, factors, opts, checkpoints, progress, say), Path(out)
    if factors:
        factors.check(model)
    check_length(model, corpus)
    key = {
        "model": factors.manifest["key"]["model"] if factors else model.fingerprint,  # which has been checked
        "corpus": corpus.fingerprint,
        "queries": queries.fingerprint,
        "factors": factors
        and digest([factors.manifest["key"], factors.manifest["fit"]["tokens"]]),  # ``until`` may end early
        "checkpoints": [[_loaded(which, model).fingerprint, weight] for which, weight in checkpoints],
        "kernel": model.attention,
        "options": opts.key(),
        "measurement": measured_by(model.task),
        "conventions": CONVENTIONS,
    }
    with locked(out):
        stage = Artifact.open(out, "trace", key, overwrite, is_report)
        if stage.done:
            dist.on_first(lambda: _tidy(out))  # a kill may have come between the two
            say(f"scores: {out} is complete and was made from the same inputs; used as it is")
            say(f"layers: {Coverage.of(stage.manifest['coverage']).line()}")
        else:
            _run(stage, asked)
            work_ended()
    return Scores(out)


def _settled(
    opts: TraceOptions, model: Model, factors: Factors | None, checkpoints: Sequence[Checkpoint]
) -> TraceOptions:
    """The options with what they do not name, and nothing among them that would be passed over."""
    kind = opts.curvature
    if factors is None and (needs_factors(kind) or (opts.refine and kind == "ekfac")):
        raise ConfigError(f"curvature {kind!r} needs factors: got none; make them with upriver fit, and give --factors")
    if (kind == "tracincp") != bool(checkpoints):
        raise ConfigError(
            f"checkpoints go with the curvature tracincp, and it with them: got curvature {kind!r} and {len(checkpoints)} "
            "checkpoints; give --curvature tracincp --checkpoints FOLDER=RATE,FOLDER=RATE"
        )
    if kind in PLAIN_GRADIENTS and (len(opts.dampings) > 1 or opts.refine):
        raise ConfigError(
            f"curvature {kind!r} inverts nothing: got --damping {opts.damping} and --refine {opts.refine}"
        )
    told = factors.options if factors else None
    if told and opts.layers not in (None, told.layers):
        raise MismatchError(
            f"the factors were fitted for other layers: got --layers {opts.layers!r} now, {told.layers!r} then; leave it out"
        )
    own = str(model.dtype).removeprefix("torch.")
    missing = {
        "layers": opts.layers or (told.layers if told else "mlp"),
        "dtype": opts.dtype or (told.dtype if told else own),
        "seed": opts.seed if opts.seed is not None else (told.seed if told else 0),
    }
    return opts.model_copy(update=missing)


def _loaded(which: str | Path | Model, like: Model) -> Model:
    """A checkpoint: as it was given, or read from its folder."""
    return which if isinstance(which, Model) else load_model(which, device=str(like.device))


def _run(stage: Artifact, asked: Given) -> None:
    times, opts, data, say = Times(), asked.opts, asked.data, asked.say
    rows, kept = _candidates(data, asked.queries, opts.candidates)
    if opts.curvature == "diagonal" and asked.factors:
        fitted = asked.factors.manifest["fit"]["tokens"]
        say(f"diagonal: measured once, on the {fitted:,} tokens that the factors were fitted on")
        fit_diagonal(asked.model, data, asked.factors, opts.memory, asked.progress)
    job = _first(stage, asked, rows)
    if len(set(job.columns)) < len(job.columns):
        raise QueryError(
            f"a question is named as the column of another one's damping: got {', '.join(job.columns)}; name it without '@'"
        )
    cover = asked.factors.manifest["coverage"] if asked.factors else _coverage(job)
    say(f"layers: {Coverage.of(cover).line()}")
    if asked.factors and asked.factors.manifest["key"]["corpus"] != data.fingerprint:
        n_train = asked.factors.manifest["n_train"]
        say(
            f"note: the factors were fitted on another corpus; nats are those of a copy among its {n_train:,} sequences"
        )
    seen = int(np.asarray(data.lengths_N)[asked.sample].sum(dtype=np.int64))
    wanted_of = request(data, rows, asked.queries, opts, job.layers, seen)
    probes = {"scan": scan_probe(wanted_of.asked)}
    announce(say, lambda: plan_here(job.model, job.layers, data, wanted_of, probes, job.division))
    parts: list[Part] = []
    for each_job in _jobs(job, asked):
        with times("queries"):
            solved = solve(each_job)
            give_back()
        with times("scan"), each_job.model.computing_in(str(opts.dtype)) as computing:
            scanning = each_job
            if computing is not each_job.model:
                scanning = each_job._replace(model=computing, layers=asked.tracked(computing))
            parts += scan(scanning, solved, say)
            give_back()
    scanned = Scanned(scan_units(job), parts, len(job.columns), len(job.layers) if opts.layer_scores else None)
    ends, sample = scanned.extremes(opts.top, len(asked.queries)), scanned.random_rows(int(opts.seed or 0))
    wanted = [np.union1d(rows_q, sample) for rows_q in ends]
    looked: list[list[Pairs]] = []
    judged: list[dict[str, Any]] = []
    for each_job in _jobs(job, asked):
        with times("rescore"):
            looked.append(rescore_top(each_job, wanted))
        with times("judging"):
            judged = judge(each_job, asked.sample, say) if not asked.checkpoints else [{"converged": True}] * len(ends)
    pairs = [Pairs(some[0].queries, [p.paths[0] for p in some]) for some in zip(*looked, strict=True)]

    def publish() -> None:
        """Write the results; the manifest last."""
        if asked.factors:
            asked.factors.check_unchanged()
        found = ranked(job, scanned, ends, sample, pairs)
        write_scores(stage.path, data, job.columns, scanned)
        write_top(stage.path, top_rows(job, found.shown, pairs))
        write_json(stage.path / "queries.json", answers(job.model, asked.queries, found.agreement, judged))
        stage.finish(manifest(job, found, kept, cover, judged, str(opts.dtype), times))
        _tidy(stage.path)

    with asked.model.computing_in(asked.exact):  # what a task notes on the way is not its own
        dist.on_first(publish)


def _first(stage: Artifact, asked: Given, rows: np.ndarray) -> Job:
    """The work on the model itself, divided so that it stays within the memory."""
    with asked.model.computing_in(asked.exact) as exact:
        layers = asked.tracked(exact)
        division = divide(exact, layers, asked.data, asked.queries, asked.opts, stage.path, asked.say)
        chosen = _solver(exact, layers, asked, division)
        return Job(
            stage,
            exact,
            layers,
            asked.data,
            asked.queries,
            asked.factors,
            rows,
            asked.opts,
            asked.progress,
            division,
            chosen,
        )


def _solver(model: Model, layers: list[Layer], asked: Given, division: Division) -> Curvature:
    """The solver that was asked for; one that goes over all layers at once has half of the room that is left for its products."""
    opts = asked.opts
    kind = "identity" if opts.curvature == "tracincp" else opts.curvature
    how = {"refine": opts.refine, "rank": opts.solver_rank, "steps": opts.solver_steps, "seed": opts.seed}
    given = {name: value for name, value in how.items() if value is not None}
    given |= {"batch_tokens": min(PRODUCT_TOKENS, opts.batch_tokens)}
    given |= {"memory_bytes": min(MOST_ROOM, division.room("queries") // 2)}
    return solver(kind, model, layers, asked.data, asked.sample, asked.factors, **given)


def _jobs(first: Job, asked: Given) -> Iterator[Job]:
    """The work on the model, or on each checkpoint, whose scores add up."""
    for number, (which, weight) in enumerate(asked.checkpoints or [(asked.model, 1.0)]):
        with _loaded(which, asked.model).computing_in(asked.exact) as exact:
            if exact is first.model:
                yield first
                continue
            layers = asked.tracked(exact)
            if [x[2:] for x in layers] != [x[2:] for x in first.layers]:
                raise ConfigError(
                    f"checkpoint {number + 1} has other layers than the model; give one of the same architecture"
                )
            part = f"checkpoint-{number}" if asked.checkpoints else ""
            chosen = _solver(exact, layers, asked, first.division)
            yield first._replace(model=exact, layers=layers, curvature=chosen, weight=weight, part=part)


def _coverage(job: Job) -> dict[str, Any]:
    found = coverage(job.model.module, job.layers)
    return found._asdict() | {"share": found.share}


def _tidy(folder: Path) -> None:
    """Remove what the stages left: all that counts of it is in the tables."""
    for name in ("solution", "solved", "scan", "rescored", "judged"):
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
