"""``upriver plan``: what a fit and a trace will take, before anything starts."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import upriver.flags as flags
from upriver.errors import ConfigError
from upriver.given import check_plan_file, check_seq_len, query_size, read_for_others, read_model
from upriver.influence.forecast import plan_model
from upriver.model.load import Model, Place
from upriver.model.planned import Blank
from upriver.model.shape import config_only
from upriver.runtime.artifact import write_json
from upriver.runtime.config import FitOptions, TraceOptions, default_how, options, parse_memory
from upriver.runtime.hardware import hardware
from upriver.runtime.plan import Request, describe, parse_sizes, request_for


@flags.opens_model
@flags.reading
def plan_command(
    reading: flags.Given,
    model: Annotated[
        Place, typer.Argument(help="As for fit; or a config.json of a model that is not there.", metavar="MODEL")
    ],
    corpus: Annotated[str, typer.Argument(help="As for fit; or its size, such as 1000000x512.", metavar="CORPUS")],
    queries: Annotated[str, typer.Option(help="A file of queries, or their number; 0 plans the fit alone.")] = "100",
    layers: flags.Layers = None,
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
    alone, size = config_only(model.name), parse_sizes(corpus)
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
        data, left = read_for_others(corpus, what, seq_len, reading)
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
        Console(highlight=False, soft_wrap=True).print(line, markup=False)
    if out:
        write_json(out, plan.as_dict(), sealed=False)
