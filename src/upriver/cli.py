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
from upriver.errors import UpriverError
from upriver.given import answered, read_checkpoints, read_corpus, read_model, read_run_file
from upriver.model.load import Place
from upriver.pipeline import trace
from upriver.planning import plan_command
from upriver.proof import verify, verify_command
from upriver.runtime.artifact import refuse_inside
from upriver.runtime.config import AuditOptions, FitOptions, RunOptions, TraceOptions, VerifyOptions, options
from upriver.runtime.units import stop
from upriver.show.commands import export_command, report_command, written_report
from upriver.show.output import steady_output
from upriver.show.report import report_files
from upriver.show.terminal import audit_summary, bars, say, terminal_summary, verified_summary
from upriver.suspects import audit
from upriver.text.queries import Queries
from upriver.text.reading import Reading

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
UsageError: Any = typer.BadParameter.__base__  # typer may bring its own copy of click
INTERRUPTED = 130  # what typer makes of Ctrl-C
stdout = Console(highlight=False, soft_wrap=True)


@app.callback()
def _upriver() -> None:
    """Follow a language model's answer upriver, to the training text it came from.  (--debug shows tracebacks.)"""


@app.command("fit")
@flags.opens_model
def fit_command(
    reading: flags.Given,
    model: flags.ModelArg,
    corpus: flags.CorpusArg,
    out: Annotated[Path, typer.Option(help="Folder for the factors.")],
    layers: flags.Layers = None,
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
    read = read_corpus(corpus, loaded, seq_len, reading | {"pack": pack, "on_bad_record": on_bad_record})
    factors = fit(loaded, read, out, overwrite=overwrite, progress=bars, say=say, **given)
    say(f"factors written to {factors.path}; next: upriver trace {model} {corpus} QUERIES --factors {out} --out SCORES")


@app.command("trace")
@flags.opens_model
def trace_command(
    reading: flags.Given,
    model: flags.ModelArg,
    corpus: flags.CorpusArg,
    queries: flags.QueriesArg,
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    samples: flags.Samples = None,
    as_set: flags.AsSet = None,
    factors: flags.FactorsFolder = None,
    curvature: flags.Curvature = "ekfac",
    refine: flags.Refine = "0",
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
    asked = Queries.read(queries, complete=complete, samples=samples, as_set=as_set)  # known before a model is loaded
    loaded = read_model(model, device, dtype or (fitted.options.dtype if fitted else None))
    if fitted:
        fitted.check(loaded)
    read = read_corpus(corpus, loaded, seq_len, reading, fitted)
    asked = answered(asked, loaded, complete)
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
@flags.opens_model
def audit_command(
    reading: flags.Given,
    model: flags.ModelArg,
    data: Annotated[
        str,
        typer.Argument(help="The training records, as CORPUS of fit; labels are their completions.", metavar="DATA"),
    ],
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
    asked = Queries.read(queries, right=True) if queries else None  # a mistake is known before a model is loaded
    loaded = read_model(model, device, dtype or (fitted.options.dtype if fitted else None))
    reading |= {"pack": False, "on_bad_record": on_bad_record}
    read = read_corpus(data, loaded, seq_len, reading, fitted)
    asked = answered(asked, loaded, None) if asked else None
    given["batch_tokens"] = batch_tokens or (fitted.options.batch_tokens if fitted else None)
    common: dict[str, Any] = {"overwrite": overwrite, "progress": bars, "say": say}
    found = audit(loaded, read, out, queries=asked, factors=fitted, **common, **given)
    audit_summary(found, stdout)
    say(f"audit: {found.page}")


app.command("plan")(plan_command)


@app.command("run")
def run_command(
    file: Annotated[Path, typer.Argument(help="Run file: the flags of fit and trace as keys.", metavar="RUN.toml")],
    overwrite: flags.Overwrite = False,
) -> None:
    """fit + trace + report from one file; with a table `verify`, verify too."""
    _run(options(RunOptions, read_run_file(file), f"{file}: "), overwrite)


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
    folder, verified = Path(opts.out), options(VerifyOptions, opts.verify or {}, "verify: ").model_dump()
    queries = Queries.read(opts.queries, complete=opts.complete, samples=opts.samples, as_set=opts.as_set)
    report_files(folder / "report.html")
    model = read_model(Place(opts.model, opts.base, opts.tokenizer), opts.device, opts.dtype)
    corpus = read_corpus(opts.corpus, model, opts.seq_len, Reading.of(opts.model_dump())._asdict())
    queries = answered(queries, model, opts.complete)
    common: dict[str, Any] = {"overwrite": overwrite, "progress": bars, "say": say}
    given = [{name: getattr(opts, name) for name in kind.model_fields} for kind in (FitOptions, TraceOptions)]
    factors = fit(model, corpus, folder / "factors", **common, **given[0])
    result = trace(model, corpus, queries, factors, folder / "scores", **common, **given[1])
    terminal_summary(result.path, console=stdout)
    if opts.verify is not None:
        verified_summary(verify(result, model, corpus, queries, factors, **common, **verified), stdout)
    return written_report(result.path, folder / "report.html")


@steady_output()
def main(command: Any = app) -> None:
    """Run the command line; an error is one sentence on standard error, and the exit status says whose fault it was."""
    debug = "--debug" in sys.argv
    args = [arg for arg in sys.argv[1:] if arg != "--debug"] or ["--help"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    signal.signal(signal.SIGTERM, stop)
    try:
        if command(args, prog_name="upriver", standalone_mode=False) == INTERRUPTED:
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
