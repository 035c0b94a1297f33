"""The command line parses, calls the library and prints; it is an ordinary client of the public interface."""

import os
import signal
import sys
import tomllib
import traceback
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import upriver.flags as flags
from upriver.curvature.fit import Factors, fit
from upriver.errors import ConfigError, UpriverError
from upriver.given import (
    check_plan_file,
    check_seq_len,
    how_read,
    query_size,
    read_checkpoints,
    read_corpus,
    read_for_others,
    read_model,
    read_queries,
)
from upriver.influence.forecast import plan_model
from upriver.model.load import Model
from upriver.model.planned import Blank
from upriver.model.shape import config_only
from upriver.pipeline import trace
from upriver.proof import verify_command
from upriver.runtime.artifact import refuse_inside, write_json
from upriver.runtime.config import (
    AuditOptions,
    FitOptions,
    RunOptions,
    TraceOptions,
    default_how,
    options,
    parse_memory,
)
from upriver.runtime.hardware import hardware
from upriver.runtime.plan import Request, describe, parse_sizes, request_for
from upriver.runtime.units import stop
from upriver.show.commands import export_command, report_command, written_report
from upriver.show.report import report_files
from upriver.show.terminal import audit_summary, bars, say, terminal_summary
from upriver.suspects import audit
from upriver.text.queries import Queries

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
UsageError: Any = typer.BadParameter.__base__  # typer may bring its own copy of click
INTERRUPTED = 130  # what typer makes of Ctrl-C
stdout = Console(highlight=False, soft_wrap=True)


@app.callback()
def _upriver() -> None:
    """Follow a language model's answer upriver, to the training text it came from.  (--debug shows tracebacks.)"""


@app.command("fit")
def fit_command(
    model: flags.ModelArg,
    corpus: flags.CorpusArg,
    out: Annotated[Path, typer.Option(help="Folder for the factors.")],
    layers: flags.Layers = "mlp",
    seq_len: flags.SeqLen = 512,
    pack: Annotated[bool, typer.Option("--pack", help="Join documents with the end token before cutting.")] = False,
    fisher: Annotated[str, typer.Option(help="sampled, empirical or (few outputs) exact labels.")] = "sampled",
    draws: flags.Draws = 1,
    max_tokens: flags.MaxTokens = 1_000_000,
    until: Annotated[
        float | None,
        typer.Option(help="Stop once scores from the two halves of the sample correlate this well, such as 0.99."),
    ] = None,
    blocks: flags.Blocks = 1,
    dtype: flags.Dtype = None,
    tf32: flags.TF32 = False,
    batch_tokens: flags.BatchTokens = None,
    memory: flags.Memory = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampled labels and of the choice of sequences.", min=0)] = 0,
    device: flags.Device = "auto",
    on_bad_record: flags.OnBadRecord = "error",
    overwrite: flags.Overwrite = False,
) -> None:
    """Fit the EK-FAC factors of MODEL on CORPUS: once per model, for any number of questions."""
    given: dict[str, Any] = {
        "layers": layers, "fisher": fisher, "draws": draws, "max_tokens": max_tokens, "until": until, "blocks": blocks,
        "dtype": dtype, "batch_tokens": batch_tokens, "memory": memory, "seed": seed, "tf32": tf32,
    }  # fmt: skip
    options(FitOptions, given)  # a mistake is known before a model is loaded
    refuse_inside(out)
    loaded = read_model(model, device, dtype)
    read = read_corpus(corpus, loaded, seq_len, pack, on_bad_record)
    factors = fit(loaded, read, out, overwrite=overwrite, progress=bars, say=say, **given)
    say(f"factors written to {factors.path}; next: upriver trace {model} {corpus} QUERIES --factors {out} --out SCORES")


@app.command("trace")
def trace_command(
    model: flags.ModelArg,
    corpus: flags.CorpusArg,
    queries: flags.QueriesArg,
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    factors: flags.FactorsFolder = None,
    curvature: flags.Curvature = "ekfac",
    refine: flags.Refine = 0,
    refine_tokens: flags.RefineTokens = None,
    combine: flags.Combine = 0,
    solver_rank: flags.SolverRank = None,
    solver_steps: flags.SolverSteps = None,
    checkpoints: flags.Checkpoints = None,
    damping: flags.Damping = "0.1x",
    rank: flags.Rank = "32",
    top: flags.Top = 100,
    candidates: flags.Candidates = None,
    held_out: flags.HeldOut = None,
    n_train: flags.NTrain = None,
    layer_scores: flags.LayerScores = False,
    unit_norm: flags.UnitNorm = False,
    complete: flags.Complete = None,
    dtype: flags.ScanDtype = None,
    tf32: flags.TraceTF32 = None,
    layers: flags.TraceLayers = None,
    seq_len: flags.TraceSeqLen = None,
    batch_tokens: flags.TraceBatchTokens = None,
    seed: flags.TraceSeed = None,
    memory: flags.Memory = None,
    device: flags.Device = "auto",
    overwrite: flags.Overwrite = False,
) -> None:
    """Score every passage of CORPUS by its influence on each answer in QUERIES."""
    given: dict[str, Any] = {
        "rank": rank, "damping": damping, "top": top, "candidates": candidates, "curvature": curvature, "refine": refine,
        "refine_tokens": refine_tokens, "solver_rank": solver_rank, "solver_steps": solver_steps, "held_out": held_out,
        "layer_scores": layer_scores, "dtype": dtype, "memory": memory, "layers": layers, "seed": seed, "tf32": tf32,
        "unit_norm": unit_norm, "n_train": n_train, "combine": combine,
    }  # fmt: skip
    options(TraceOptions, given)
    rates = read_checkpoints(checkpoints)
    refuse_inside(out)
    fitted = Factors(factors) if factors else None
    how = how_read(fitted, seq_len)
    Queries.read(queries, complete=complete)  # a mistake in them is known before a model is loaded
    loaded = read_model(model, device, dtype or (fitted.options.dtype if fitted else None))
    if fitted:
        fitted.check(loaded)
    read = read_corpus(corpus, loaded, **how)
    asked = read_queries(queries, loaded, complete)
    given["batch_tokens"] = batch_tokens or (fitted.options.batch_tokens if fitted else None)
    result = trace(
        loaded, read, asked, fitted, out, checkpoints=rates, overwrite=overwrite, progress=bars, say=say, **given
    )
    terminal_summary(result.path, console=stdout)
    say(f"next: upriver report {out} --open")


app.command("report")(report_command)
app.command("export")(export_command)
app.command("verify")(verify_command)


@app.command("audit")
def audit_command(
    model: flags.ModelArg,
    data: Annotated[str, typer.Argument(help="The training records, as CORPUS of fit.", metavar="DATA")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    factors: Annotated[
        Path | None, typer.Option(help="Folder written by fit. Default: fits its own, in AUDIT.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help="Failed samples with the right answers, as QUERIES of trace: adds harm to them.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="self_influence, loss, gradient_norm or harm. Default: self-influence and loss.")
    ] = None,
    top: Annotated[int, typer.Option(help="Records on the page.", min=1)] = 100,
    curvature: Annotated[str, typer.Option(help="ekfac, kfac, diagonal or identity.")] = "ekfac",
    damping: Annotated[str, typer.Option(help="0.1x of the mean eigenvalue, or an absolute number.")] = "0.1x",
    layers: flags.TraceLayers = None,
    seq_len: flags.TraceSeqLen = None,
    max_tokens: flags.MaxTokens = 1_000_000,
    dtype: flags.ScanDtype = None,
    batch_tokens: flags.TraceBatchTokens = None,
    seed: flags.TraceSeed = None,
    memory: flags.Memory = None,
    device: flags.Device = "auto",
    on_bad_record: flags.OnBadRecord = "error",
    overwrite: flags.Overwrite = False,
) -> None:
    """Rank the records of DATA by how likely they are mislabelled or harmful."""
    given: dict[str, Any] = {
        "by": by, "top": top, "curvature": curvature, "damping": damping, "layers": layers, "max_tokens": max_tokens,
        "dtype": dtype, "seed": seed, "memory": memory,
    }  # fmt: skip
    options(AuditOptions, given)
    refuse_inside(out)
    fitted = Factors(factors) if factors else None
    if queries:
        Queries.read(queries)  # a mistake in them is known before a model is loaded
    loaded = read_model(model, device, dtype or (fitted.options.dtype if fitted else None))
    read = read_corpus(data, loaded, how_read(fitted, seq_len)["seq_len"], False, on_bad_record)
    asked = read_queries(queries, loaded, None) if queries else None
    given["batch_tokens"] = batch_tokens or (fitted.options.batch_tokens if fitted else None)
    common: dict[str, Any] = {"overwrite": overwrite, "progress": bars, "say": say}
    found = audit(loaded, read, out, queries=asked, factors=fitted, **common, **given)
    audit_summary(found, stdout)
    say(f"audit: {found.page}")


@app.command("plan")
def plan_command(
    model: Annotated[
        str, typer.Argument(help="As for fit; or a config.json of a model that is not there.", metavar="MODEL")
    ],
    corpus: Annotated[str, typer.Argument(help="As for fit; or its size, such as 1000000x512.", metavar="CORPUS")],
    queries: Annotated[str, typer.Option(help="A file of queries, or their number; 0 plans the fit alone.")] = "100",
    layers: flags.Layers = "mlp",
    seq_len: flags.SeqLen = 512,
    max_tokens: flags.MaxTokens = 1_000_000,
    rank: flags.Rank = "32",
    top: flags.Top = 100,
    draws: flags.Draws = 1,
    blocks: flags.Blocks = 1,
    dtype: flags.Dtype = None,
    batch_tokens: flags.BatchTokens = None,
    memory: flags.Memory = None,
    machine: Annotated[
        str | None,
        typer.Option("--hardware", help="Plan for another machine, such as h100x8. Default: this one, measured."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the plan as JSON.")] = None,
) -> None:
    """Passes, operations, time, memory and disk of a fit and a trace, before anything starts."""
    traced = options(TraceOptions, {"rank": rank, "top": top})
    if out:
        check_plan_file(out)
    options(FitOptions, {"max_tokens": max_tokens, "dtype": dtype, "batch_tokens": batch_tokens})
    alone, size = config_only(model), parse_sizes(corpus)
    what = alone or read_model(model, "auto", dtype)
    if isinstance(what, Path) and size is None:
        raise ConfigError(
            f"a configuration has no tokenizer to read a corpus with: got {corpus!r}; give its size, as 1000000x512"
        )
    if size is not None:
        if isinstance(what, Model):
            check_seq_len(what, size[1])
        data, left = Blank(*size), 0
    else:
        assert isinstance(what, Model)
        data, left = read_for_others(corpus, what, seq_len)
    gpu = hardware(machine).accelerator if machine else isinstance(what, Model) and what.device.type != "cpu"
    asked: dict[str, Any] = {
        "fit_tokens": max_tokens, "rank": None if traced.rank == "full" else traced.rank, "top": top,
        "draws": draws, "blocks": blocks, "memory": parse_memory(memory),
        **default_how(gpu, dtype, batch_tokens, "bfloat16"),
    }  # fmt: skip
    asked |= query_size(queries, what)
    request = Request(size[0], size[1], **asked) if size else request_for(data.lengths_N, **asked)
    plan = plan_model(what, data, layers, request, machine, left)
    for line in describe(plan):
        stdout.print(line, markup=False)
    if out:
        write_json(out, plan.as_dict(), sealed=False)


@app.command("run")
def run_command(
    file: Annotated[Path, typer.Argument(help="Run file: the flags of fit and trace as keys.", metavar="RUN.toml")],
    overwrite: flags.Overwrite = False,
) -> None:
    """fit + trace + report from one file."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the run file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    _run(options(RunOptions, values, f"{file}: "), overwrite)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("upriver-demo"),
    overwrite: flags.Overwrite = False,
) -> None:
    """The whole thing on the embedded model and corpus: State of the Union speeches, and what they taught a small model."""
    with resources.as_file(resources.files("upriver") / "demo") as folder:
        values = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
        places = {name: str(folder / values[name]) for name in ("model", "corpus", "queries")}
        page = _run(options(RunOptions, {**values, **places, "out": str(out)}, "demo: "), overwrite)
    say(f"done: open {page.resolve()}")


def _run(opts: RunOptions, overwrite: bool) -> Path:
    folder = Path(opts.out)
    Queries.read(opts.queries, complete=opts.complete)  # a mistake in them is known before a model is loaded
    report_files(folder / "report.html")
    model = read_model(opts.model, opts.device, opts.dtype)
    corpus = read_corpus(opts.corpus, model, opts.seq_len, opts.pack, opts.on_bad_record)
    queries = read_queries(opts.queries, model, opts.complete)
    common: dict[str, Any] = {"overwrite": overwrite, "progress": bars, "say": say}
    given = [{name: getattr(opts, name) for name in kind.model_fields} for kind in (FitOptions, TraceOptions)]
    factors = fit(model, corpus, folder / "factors", **common, **given[0])
    result = trace(model, corpus, queries, factors, folder / "scores", **common, **given[1])
    terminal_summary(result.path, console=stdout)
    return written_report(result.path, folder / "report.html")


def main() -> None:
    """Run the command line; an error is one sentence on standard error, and the exit status says whose fault it was."""
    debug = "--debug" in sys.argv
    args = [arg for arg in sys.argv[1:] if arg != "--debug"] or ["--help"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    signal.signal(signal.SIGTERM, stop)
    try:
        if app(args, prog_name="upriver", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    except UpriverError as error:
        _fail(error, str(error), error.exit_status, debug)
    except UsageError as error:
        _fail(error, _usage(error, args), 2, debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        _fail(error, "interrupted; what was finished is kept, and the same command goes on from there", 1, debug)
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}; give the command again with --debug to see where"
        _fail(error, text, 1, debug)


def _usage(error: Any, args: list[str]) -> str:
    """Say what is wrong with the arguments, and with which value."""
    text = " ".join(error.format_message().split()).rstrip(".")
    opts = error.param.opts if isinstance(error, typer.BadParameter) and error.param else []
    given = [value for arg, value in pairwise(args) if arg in opts]
    value = f", got {given[-1]!r}" if given else ""
    command = error.ctx.command_path if error.ctx else "upriver"
    return f"{text[0].lower()}{text[1:]}{value}; see {command} --help"


def _fail(error: BaseException, text: str, status: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    say(f"error: {' '.join(text.split())}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
