"""The audit of training data: which records are most likely mislabelled or harmful, by what the model itself makes of them.

    self-influence, loss and gradient norm of every sequence    one pass           influence/self_influence.py
    harm: minus the mean influence on failed samples            a trace            pipeline.py

AUDIT/factors/                 of its own fit, where none were given
AUDIT/self/                    units of the pass, until it is done
AUDIT/scores/                  the trace of the failed samples: a folder as of ``upriver trace``
AUDIT/audit.parquet, records.jsonl (or .parquet), audit.html, manifest.json
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from upriver.curvature.choose import needs_factors
from upriver.curvature.factors import Factors
from upriver.curvature.fit import fit
from upriver.errors import ConfigError, CorpusError
from upriver.influence.queries import Measured, Measurements
from upriver.influence.results import parquet
from upriver.influence.self_influence import block_options, check_block, measured
from upriver.model.capture import frozen
from upriver.model.check import check_data
from upriver.model.fingerprint import measured_by
from upriver.model.model import Model, check_model
from upriver.model.planned import division_file
from upriver.model.tasks import Classification
from upriver.pipeline import trace
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, discard, locked
from upriver.runtime.config import CONVENTIONS, AuditOptions, TraceOptions, options
from upriver.runtime.progress import Progress, Say, Times, mute, silent
from upriver.show.audit import Audit, Card, cards_of_examples, write_page, write_records
from upriver.show.report import is_report
from upriver.text.batch import Sequences
from upriver.text.corpus import Corpus
from upriver.text.examples import Examples
from upriver.text.queries import Queries

DEFAULT_BY = "self_influence+loss"  # in no study far below the best (studies/audit/README.md)
Labelled = Examples | tuple[Any, Any]


class Asked(NamedTuple):
    """What an audit was given, once it has been checked."""

    model: Model
    data: Sequences
    queries: Measured | None
    factors: Factors | None
    opts: AuditOptions
    progress: Progress
    say: Say


def audit(
    model: Model,
    data: Corpus | Labelled,
    out: str | Path,
    *,
    queries: Queries | Measurements | Labelled | None = None,
    factors: Factors | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> Audit:
    """Rank the records of ``data`` by how likely they are mislabelled or harmful, into the folder ``out``.

    A record of several sequences has the sum of their self-influences, losses and harms, and the root of the sum of their squared
    gradient norms: what windows of one document do to each other is left out.

    Args:
        data: a corpus of texts, prompts with completions, or conversations; for a labelled task examples, or a pair of arrays
            ``(x, y)`` as scikit-learn takes them.
        queries: failed samples or wrongly predicted examples, with the answers that they should have got: ``harm`` is minus the
            mean influence on their measurements, raw as in ``scores.parquet``; training on a harmful record lowers them.
        factors: None: they are fitted on ``data``, into ``out/factors``.
        given: ``by`` (``self_influence``, ``loss``, ``gradient_norm`` or ``harm``: what is ranked by; None: the mean
            of the ranks by self-influence and by loss), ``top``, ``curvature``, ``damping``, ``rank``, ``layers``,
            ``max_tokens``, ``dtype``, ``batch_tokens``, ``seed``, ``memory``; see :class:`AuditOptions`.

    Raises:
        InputError: an option, the data, the queries or the folder cannot be used.
        NumericalError: a NaN or an infinity on the way.
        ResourceError: the memory of the device ran out.

    Example:
        >>> found = up.audit(model, (x_train, y_train), out="audit")
        >>> found.frame().head(20)  # the most suspect first
    """
    check_model(model)
    opts, out = options(AuditOptions, given), Path(out)
    if opts.by == "harm" and queries is None:
        raise ConfigError("harm is what failed samples suffer: got by='harm' and no queries; give --queries FILE")
    sequences = data if isinstance(data, Sequences) else examples(data, "the data")
    if isinstance(sequences, Corpus) and sequences.pack:
        raise CorpusError(
            "an audit is of single records: got a packed corpus, whose sequences hold several; read it unpacked"
        )
    check_data(model, sequences)
    asked_of = _measured(model, queries)
    asked = Asked(model, sequences, asked_of, factors, _settled(opts, model, sequences, factors), progress, say)
    if factors:
        factors.check(model)
    key = {
        "model": factors.manifest["key"]["model"] if factors else model.fingerprint,  # which has been checked
        "corpus": sequences.fingerprint,
        "queries": asked_of and asked_of.fingerprint,
        "factors": factors and factors.fingerprint,
        "kernel": model.attention,
        "options": asked.opts.key(),
        "measurement": measured_by(model.task) if asked_of else None,
        "conventions": CONVENTIONS,
    }
    with locked(out):
        stage = Artifact.open(out, "audit", key, overwrite, is_report)
        if stage.done:
            dist.on_first(lambda: _tidy(out))  # a kill may have come between the two
            say(f"audit: {out} is complete and was made from the same inputs; used as it is")
        else:
            _run(stage, asked)
    return Audit(out)


def _run(stage: Artifact, asked: Asked) -> None:
    model, data, opts, times = asked.model, asked.data, asked.opts, Times()
    common: dict[str, Any] = {"progress": asked.progress, "say": asked.say}
    named = {name: getattr(opts, name) for name in ("layers", "dtype", "batch_tokens", "seed", "memory", "unit_tokens")}
    factors = asked.factors
    if factors is None and needs_factors(opts.curvature):
        with times("fit"):
            fitted = {name: value for name, value in named.items() if value is not None}
            factors = fit(model, data, stage.path / "factors", max_tokens=opts.max_tokens, **common, **fitted)
    how = named | {"curvature": opts.curvature, "damping": opts.damping}
    with times("self-influence"):
        traced = block_options(options(TraceOptions, how), model, factors)
        table = measured(stage, model, data, factors, traced, **common)
    table["harm"] = np.nan
    if asked.queries is not None:
        with times("harm"):
            shown = {"rank": opts.rank, "top": min(10, len(data)), "held_out": 0}
            found = trace(model, data, asked.queries, factors, stage.path / "scores", **common, **how, **shown)
            table["harm"] = -found.frame()[asked.queries.ids].to_numpy(np.float64).mean(1)
    frame, by = ranked(by_record(data, table), opts.by)
    dist.on_first(lambda: _publish(stage, asked, frame, by, times))


def by_record(data: Sequences, table: pd.DataFrame) -> pd.DataFrame:
    """A row for each record with loss: its number in ``row``, and what was measured of its sequences together."""
    record_N = np.asarray(data.record_of_N) if isinstance(data, Corpus) else np.arange(len(data))
    squared = table.assign(gradient_norm=table["gradient_norm"] ** 2)
    sums: Any = squared.groupby(record_N).sum(min_count=1)
    sums["gradient_norm"] **= 0.5
    return sums.rename_axis("row").reset_index()


def ranked(frame: pd.DataFrame, by: str | None) -> tuple[pd.DataFrame, str]:
    """The records with their ``suspicion``, the most suspect first, and what it is made of.

    Suspicion is the share of the records that are no more suspect, from above 0 to 1, of those with equal values the mean; where
    two measures are taken together, by the mean of these shares.
    """
    by = by or DEFAULT_BY
    ranks = sum(frame[name].rank(pct=True) for name in by.split("+"))
    frame.insert(1, "suspicion", pd.Series(ranks).rank(pct=True))
    return frame.sort_values(["suspicion", "row"], ascending=[False, True], ignore_index=True), by


def _publish(stage: Artifact, asked: Asked, frame: pd.DataFrame, by: str, times: Times) -> None:
    """Write the results; the manifest last."""
    data, opts = asked.data, asked.opts
    if asked.factors:
        asked.factors.check_unchanged()
    shown = frame["row"].head(opts.top).tolist()
    with parquet(stage.path / "audit.parquet", len(frame)) as add:
        add(frame)
    cards: dict[int, Card]
    named: dict[str, str] = {}  # columns of the records
    if isinstance(data, Corpus):
        cards, named = write_records(stage.path, data, frame, set(shown))
    elif isinstance(data, Examples):
        cards = cards_of_examples(data, shown, _predicted(asked.model, data, np.array(shown)))
    else:
        cards = dict.fromkeys(shown, Card("", []))
    of = str(data.info["path"] or "records") if isinstance(data, Corpus) else f"{len(data):,} examples"
    head = {"model": asked.model.name, "data": of, "by": by, "curvature": opts.curvature, "damping": opts.damping}
    head |= {"records": len(frame), "queries": len(asked.queries) if asked.queries is not None else 0}
    write_page(stage.path, frame.head(opts.top), cards, head)
    stage.finish({"audit": head | {"columns": named}, "timings": dict(times)})
    _tidy(stage.path)


def _tidy(folder: Path) -> None:
    discard(folder / "self")
    division_file(folder).unlink(missing_ok=True)


# ---- what it is given


def examples(given: Any, what: str) -> Examples:
    """Examples of a pair of arrays: numbers ``x``, and a label each, whole ones classes; or of all that :class:`Examples` takes.

    Raises:
        CorpusError: they are no such arrays.
    """
    if not isinstance(given, tuple) or len(given) != 2:
        return given if isinstance(given, Examples) else Examples(given)
    arrays = {}
    for name, x in zip(("x", "y"), given, strict=True):
        array = x.numpy(force=True) if isinstance(x, torch.Tensor) else np.asarray(x)
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            kind = "a NaN or an infinity" if array.dtype.kind == "f" else f"an array of {array.dtype}"
            raise CorpusError(
                f"{what} is not finite numbers in {name!r}: got {kind}; encode labels as whole numbers from 0"
            )
        whole = name == "y" and array.dtype.kind in "biu"
        arrays[name] = torch.from_numpy(
            array.astype(np.int64 if whole else array.dtype if array.dtype.kind == "f" else np.float32)
        )
    return Examples(arrays)


def _measured(model: Model, queries: Any) -> Measured | None:
    if isinstance(queries, Queries):
        return queries.bound(model.tokenizer, model.longest)
    if queries is None or isinstance(queries, Measurements):
        return queries
    asked = examples(queries, "what is asked")
    model.task.check(model.module, asked)
    return Measurements(asked)


def _settled(opts: AuditOptions, model: Model, data: Sequences, factors: Factors | None) -> AuditOptions:
    """The options with the layers named, and nothing in them that would be refused later."""
    if factors is None and opts.layers is None:
        opts = opts.model_copy(update={"layers": model.default_layers if isinstance(data, Corpus) else "*"})
    check_block(options(TraceOptions, {"damping": opts.damping, "rank": opts.rank}))
    return opts


@torch.no_grad()
def _predicted(model: Model, data: Examples, rows: np.ndarray) -> list[str]:
    """What a classifier says of some examples, in words; nothing for other tasks."""
    if not isinstance(model.task, Classification):
        return [""] * len(rows)
    with frozen(model.module):
        p_NC = model.task.outputs(model.module, data.batch(rows).to(model.device)).softmax(1).cpu()
    best_N = p_NC.max(1)
    return [f"{int(k)} ({float(p):.0%})" for p, k in zip(*best_N, strict=True)]
