"""``verify``: what the passages of a report really do to the answers, beside what was predicted."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console

import upriver.flags as flags
from upriver.curvature.factors import Factors
from upriver.errors import ConfigError, InputError, MismatchError
from upriver.evaluate.verified import HEAD, check_place, compared, read_verified, write_verified
from upriver.evaluate.verify import Trial, agreement, realised
from upriver.influence.job import Given
from upriver.influence.queries import Measured, in_turn
from upriver.influence.results import calibration
from upriver.model.load import Place
from upriver.model.model import Model
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, Tensors, digest, discard, locked, read_tensors
from upriver.runtime.config import PLAIN_GRADIENTS, TraceOptions, VerifyOptions, options
from upriver.runtime.device import float32_products, memory_told
from upriver.runtime.progress import Progress, Say, mute, silent
from upriver.runtime.units import each
from upriver.show.folder import Json, read_columns, read_results
from upriver.show.report import report_files
from upriver.show.scores import Scores
from upriver.show.terminal import bars, say, verified_summary
from upriver.text.batch import Sequences
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries
from upriver.text.reading import Reading

AT_ONCE, ROOM, VECTORS = 4, 1 << 30, 16  # queries solved side by side, the bytes that they may take, vectors of each


def verify(
    scores: str | Path | Scores,
    model: Model | Place | str | Path | None = None,
    corpus: Sequences | str | Path | None = None,
    queries: Measured | None = None,
    factors: Factors | str | Path | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> Json:
    """Measure what one more copy of the shown passages, and of random ones, does to each answer, beside what was predicted.

    Writes ``verify.parquet`` and ``verify.json`` into the folder of results; a report that is made afterwards shows them.

    Args:
        scores: a finished trace, or its folder.
        model, corpus, queries, factors: what it was made from; None: read again from where its manifest says.
        given: ``how`` (``proximal`` or ``finetune``), ``top``, ``random``, ``steps``, ``tokens``, ``seed``; see
            :class:`VerifyOptions`.

    Returns:
        What ``verify.json`` holds (``docs/formats.md``): of all queries and of each ``pearson``, ``slope`` and ``scale``
        between predicted (calibrated where the trace was) and realised nats, for shown and for random passages.

    Raises:
        InputError: an option, or what was given is not what the trace was made from.
        MismatchError: the folder holds another verification, or files of the same name that no verification wrote.

    Example:
        >>> up.verify("scores")["shown"]["pearson"]
    """
    path = scores.path if isinstance(scores, Scores) else Path(scores)
    opts = options(VerifyOptions, given)
    manifest, told = read_results(path)
    traced = TraceOptions(**manifest["key"]["options"])
    if traced.curvature in PLAIN_GRADIENTS and opts.how == "proximal":
        raise ConfigError(
            f"a trace of curvature {traced.curvature!r} has no damping, and so no proximal step: got how='proximal'; "
            "give --how finetune"
        )
    key = {"scores": digest(manifest["key"]), "options": opts.model_dump()}
    with locked(path), float32_products(bool(traced.tf32)):
        if check_place(path, key, overwrite):
            say(f"verified: {path / HEAD} is there and was made with the same options; used as it is")
        else:
            asked = _asked(path, manifest, told, (model, corpus, queries, factors), device, progress)
            with memory_told("the verification", 512), asked.model.task_kept():
                scales = {x["id"]: calibration(x.get("solution")) for x in told}
                _run(path, Artifact.open(path / "verify", "verify", key, overwrite), asked, opts, manifest, scales)
        found = read_verified(path)
    assert found
    return found[0]


def _run(path: Path, stage: Artifact, asked: Given, opts: VerifyOptions, manifest: Json, scales: Json) -> None:
    start, ids = time.perf_counter(), asked.queries.ids
    pairs = _pairs(path, ids, opts, manifest["n_train"])
    trial = Trial(asked, opts, [pairs.loc[pairs["query"] == name, "sequence"].to_numpy(np.int64) for name in ids])
    P = sum(int(np.prod(layer["shape"])) for layer in manifest["layers"])
    at_once = max(1, min(AT_ONCE, ROOM // (VECTORS * 4 * P)))
    chunks = in_turn(len(ids), at_once)
    with asked.progress("verify (questions)", len(ids)) as advance:

        def compute(unit: int) -> Tensors:
            found = realised(trial, chunks[unit])
            advance(len(chunks[unit]))
            return {name: x.double().cpu() for name, x in found.items()}

        files = each(stage, len(chunks), compute)

    def publish() -> None:
        parts = [read_tensors(file) for file in files]
        found = {name: torch.cat([x[name] for x in parts]).numpy() for name in parts[0]}
        _fill(pairs, trial, found, manifest["n_train"])
        proximal = opts.how == "proximal"  # a gradient step is not predicted by the solutions that were judged
        factors = np.array([scales[name] or np.nan for name in pairs["query"]]) if proximal else np.nan
        pairs["calibrated_nats"] = pairs["predicted_nats"] * factors
        key = {name: stage.key[name] for name in ("scores", "options")}
        told = {"upriver": version("upriver"), "key": key, "n_train": manifest["n_train"], **_summary(pairs, trial)}
        write_verified(path, pairs, told | {"seconds": time.perf_counter() - start})
        discard(stage.path)

    dist.on_first(publish)


def _fill(pairs: pd.DataFrame, trial: Trial, found: dict[str, np.ndarray], n_train: int) -> None:
    counts = [len(rows) for rows in trial.wanted]
    pairs["realised_nats"] = found["realised"] / n_train
    if "predicted" in found:
        pairs["predicted_nats"] = found["predicted"] / n_train
    for name in ("residual", "length"):
        pairs[name] = np.repeat(found[name], counts) if name in found else np.nan


def _summary(pairs: pd.DataFrame, trial: Trial) -> Json:
    proximal, lengths_N = trial.opts.how == "proximal", np.asarray(trial.asked.data.lengths_N)
    samples = trial.samples() if proximal else (np.empty(0, np.int64),) * 2
    sizes = [{"sequences": len(rows), "tokens": int(lengths_N[rows].sum())} for rows in samples]
    return {
        "how": trial.opts.how,
        "damping": trial.asked.opts.dampings[0] if proximal else None,
        "sample": sizes[0],
        "length_from": sizes[1],
        **_both(pairs),
        "uncalibrated": _both(pairs.drop(columns="calibrated_nats"))
        if np.isfinite(pairs["calibrated_nats"].to_numpy()).any()
        else None,
        "queries": [_query(name, own) for name, own in pairs.groupby("query", sort=False)],
    }


def _both(pairs: pd.DataFrame) -> Json:
    parts: dict[str, Any] = {"shown": pairs[pairs["shown"]], "random": pairs[~pairs["shown"]]}
    return {name: agreement(compared(x).to_numpy(), x["realised_nats"].to_numpy()) for name, x in parts.items()}


def _query(name: Any, own: Any) -> Json:
    said = {x: None if own[x].isna().all() else float(own[x].iloc[0]) for x in ("residual", "length")}
    return {"id": name, **said, **_both(own)}


def _pairs(path: Path, ids: list[str], opts: VerifyOptions, n_train: int) -> pd.DataFrame:
    """The passages shown of each query, and random ones of the scored sequences, the same for all queries."""
    top: Any = read_columns(path / "top.parquet", ["query", "side", "rank", "sequence", "score"])
    top = top[top["rank"] <= opts.top]
    scores: Any = read_columns(path / "scores.parquet", ["sequence", *ids])
    rest = scores.loc[~scores["sequence"].isin(top["sequence"])].to_dict("records")
    wanted = 2 * opts.top if opts.random is None else opts.random
    drawn = [rest[i] for i in np.sort(np.random.default_rng(opts.seed).permutation(len(rest))[:wanted])]
    rows: list[Json] = []
    for name in ids:
        rows += [x | {"shown": True} for x in top[top["query"] == name].to_dict("records")]
        rows += [{"query": name, "sequence": x["sequence"], "score": x[name], "shown": False} for x in drawn]
    pairs = pd.DataFrame(rows, columns=pd.Index(["query", "sequence", "shown", "score", "side", "rank"]))
    pairs["predicted_nats"] = pairs.pop("score").astype(np.float64) / n_train
    return pairs


# ---- what the trace was made from


def _asked(path: Path, manifest: Json, told: list[Json], given: tuple, device: str, progress: Progress) -> Given:
    """What the trace was made from: as it was given, or read again; each has the fingerprint that the trace tells."""
    key, (model, corpus, queries, factors) = manifest["key"], given
    if not isinstance(model, Model):
        known, place = manifest["model"] or {}, model if isinstance(model, Place) else Place(str(model or ""))
        base = place.base or (None if place.name else known.get("base"))
        place = Place(place.name or known.get("name", ""), base, place.tokenizer or known.get("tokenizer"))
        model = _again("model", place.name, lambda _: place.load(None, device))
    _same(path, key, "model", model.fingerprint)
    if not isinstance(corpus, Sequences):
        info = manifest["corpus"] or {}
        how: Json = {name: info[name] for name in Reading._fields if name in info}
        corpus = _again("corpus", corpus or info.get("path"), lambda name: Corpus.read(name, model.tokenizer, **how))
    _same(path, key, "corpus", corpus.fingerprint)
    if queries is None:
        if any("asked" not in x for x in told):
            raise ConfigError("the questions of this trace are no text: got none; give its queries from Python")
        queries = Queries.of([record for x in told for record in x["asked"]])
    if isinstance(queries, Queries):
        queries = queries.bound(model.tokenizer, model.longest)
    _same(path, key, "queries", queries.fingerprint)
    if key["factors"] is None:
        factors = None
    else:
        if not isinstance(factors, Factors):
            there = manifest.get("factors")  # from the folder of the scores
            factors = _again("factors", factors or (there and path / there), Factors)
        _same(path, key, "factors", factors.fingerprint)
    return Given(model, corpus, queries, factors, TraceOptions(**key["options"]), (), progress, mute)


def _again(what: str, name: Any, read: Any) -> Any:
    if not name:
        raise ConfigError(f"the {what} of the trace was in memory, so it cannot be read again: got none; give it")
    try:
        return read(name if isinstance(name, list) else str(name))
    except InputError as error:
        raise type(error)(f"the {what} of the trace cannot be read: {error} (or give it with --{what})") from error


def _same(path: Path, key: Json, what: str, found: str) -> None:
    if key[what] != found:
        raise MismatchError(
            f"{path} was traced with another {what}: got {found!r} now, {key[what]!r} then; give the one that it was made from"
        )


# ---- the command


@flags.opens_model
def verify_command(
    scores: Annotated[Path, typer.Argument(help="Folder written by upriver trace.", metavar="SCORES")],
    model: Annotated[Place | None, typer.Option(help="The model, where it is no longer in its place.")] = None,
    corpus: Annotated[str | None, typer.Option(help="The corpus, likewise.")] = None,
    factors: Annotated[Path | None, typer.Option(help="The factors, likewise.")] = None,
    how: Annotated[
        str, typer.Option(help="proximal: the response with curvature; finetune: a gradient step on the passage.")
    ] = "proximal",
    top: Annotated[int, typer.Option(help="Passages of each side of a question.", min=1)] = 5,
    random: Annotated[
        int | None, typer.Option(help="Random passages beside them. Default: as many as are shown.", min=0)
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of conjugate gradients, at most.", min=1)] = 10,
    tokens: Annotated[int, typer.Option(help="Tokens of the sample that is solved on.", min=1)] = 6000,
    seed: Annotated[int, typer.Option(help="Seed of the samples.", min=0)] = 0,
    device: flags.Device = "auto",
    overwrite: flags.Overwrite = False,
) -> None:
    """Measure what the passages shown really do to the answers, beside what was predicted."""
    given = {"how": how, "top": top, "random": random, "steps": steps, "tokens": tokens, "seed": seed}
    told = verify(
        scores, model, corpus, None, factors, device=device, overwrite=overwrite, progress=bars, say=say, **given
    )
    verified_summary(told, Console(highlight=False, soft_wrap=True))
    there = [file for file in report_files(scores) if file.exists()]
    say(f"next: upriver report {scores} --open" + (" (the report there does not show it yet)" if there else ""))
