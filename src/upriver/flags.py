"""The arguments and flags of the command line, each with its help."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from upriver.model.load import Place
from upriver.runtime.config import CURVATURES

ModelArg = Annotated[
    Place, typer.Argument(help="A Hugging Face folder (of an adapter too) or name, or a .gguf file.", metavar="MODEL")
]
CorpusArg = Annotated[
    str,
    typer.Argument(help="JSONL, Parquet, CSV, text file or folder, or a `datasets` folder or name.", metavar="CORPUS"),
]
QueriesArg = Annotated[
    str,
    typer.Argument(
        help="JSONL, JSON, CSV or Parquet with id, prompt, completion; or logs of evaluations.", metavar="QUERIES"
    ),
]
Samples = Annotated[
    str | None,
    typer.Option(
        help="Of the log of an evaluation: failed, passed or all; failed:SCORE by another score. Default: failed."
    ),
]
AsSet = Annotated[str | None, typer.Option(help="Ask all of QUERIES as one question of this name: their mean.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N; cuda is a process's own GPU under torchrun.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory limit, such as 8GB: the work is divided to stay below it. Default: 80 % of what is free."
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Tokens to fit on, from random sequences.", min=1)]
BatchTokens = Annotated[
    int | None, typer.Option(help="Tokens of a batch, padding counted. Default: 2048, on a GPU 16384.", min=1)
]
Blocks = Annotated[
    int, typer.Option(help="Diagonal blocks of A and S, for very wide layers; what is between them is left out.", min=1)
]
Draws = Annotated[
    int, typer.Option(help="Sampled labels of a position, of which the mean is taken; as many passes.", min=1)
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="mlp, attention, all, lora, or globs separated by commas. Default: lora for an adapter, else mlp."
    ),
]
SeqLen = Annotated[int, typer.Option(help="Tokens of a sequence; longer documents are cut into windows.", min=2)]
Rank = Annotated[str, typer.Option(help="Rank of the compressed queries, or full.")]
Top = Annotated[int, typer.Option(help="Passages per side that are rescored at full rank and shown.", min=1)]
Dtype = Annotated[
    str | None,
    typer.Option(help="Compute type: float32, bfloat16 or mixed. Default: float32, on a GPU that of the checkpoint."),
]
TF32 = Annotated[bool, typer.Option("--tf32", help="Round products of float32 on CUDA to TF32: faster, less exact.")]
OnBadRecord = Annotated[str, typer.Option(help="error, or skip and list.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in the folder.")]
FactorsFolder = Annotated[
    Path | None, typer.Option(help="Folder written by upriver fit; exact, identity, cg and the like do without.")
]
Curvature = Annotated[str, typer.Option(help=f"One of {', '.join(CURVATURES)}.")]
Refine = Annotated[
    str,
    typer.Option(
        help="Steps of conjugate gradients from that solution, on the exact Gauss-Newton matrix, or auto: as many as help."
    ),
]
RefineTokens = Annotated[
    int | None, typer.Option(help="Tokens that a matrix-free solver goes over. Default: the fit's sample.", min=1)
]
Combine = Annotated[
    int,
    typer.Option(
        help="Tokens, such as 4000, on which solutions at three dampings are combined for each question.", min=0
    ),
]
SolverRank = Annotated[int | None, typer.Option(help="Rank of arnoldi and nystrom.", min=1)]
SolverSteps = Annotated[int | None, typer.Option(help="Steps of cg, lissa and astra at most.", min=1)]
Checkpoints = Annotated[
    str | None, typer.Option(help="For tracincp: FOLDER=RATE,.. of models in training and their learning rates.")
]
Damping = Annotated[str, typer.Option(help="0.1x of the mean eigenvalue, or an absolute number; several with commas.")]
Candidates = Annotated[int | None, typer.Option(help="Score only the best N by TF-IDF, per query.", min=1)]
HeldOut = Annotated[
    int | None, typer.Option(help="Tokens, unseen by the solver, that judge its solutions; 0: none.", min=0)
]
NTrain = Annotated[
    int | None,
    typer.Option(
        help="Sequences that the model was trained on, for nats. Default: of the corpus of the factors.", min=1
    ),
]
LayerScores = Annotated[bool, typer.Option("--layer-scores", help="Write layers.npy as well.")]
UnitNorm = Annotated[
    bool, typer.Option("--unit-norm", help="Write ID@unit columns as well: scores over the lengths of both gradients.")
]
Complete = Annotated[
    int | None, typer.Option(help="Let the model answer queries without completion, in N tokens.", min=1)
]
ScanDtype = Annotated[
    str | None, typer.Option(help="Compute type of the scan, as for fit. Default: that of the factors.")
]
TraceTF32 = Annotated[bool | None, typer.Option("--tf32/--no-tf32", help="As for fit. Default: that of the factors.")]
TraceLayers = Annotated[
    str | None,
    typer.Option(help="As for fit, where there are no factors. Default: those of the factors, or as for fit."),
]
TraceSeqLen = Annotated[
    int | None, typer.Option(help="As for fit. Default: as the factors were fitted, or 512.", min=2)
]
TraceBatchTokens = Annotated[int | None, typer.Option(help="As for fit. Default: that of the factors.", min=1)]
TraceSeed = Annotated[int | None, typer.Option(help="As for fit. Default: that of the factors.", min=0)]
Given = dict[str, Any]
READING: dict[str, Any] = {
    "text_field": Annotated[str | None, typer.Option(help="Field of a record that is its text, or its messages.")],
    "prompt_field": Annotated[str | None, typer.Option(help="Field that is the prompt.")],
    "completion_field": Annotated[
        str | None, typer.Option(help="Field that is learned; of preference records chosen (default) or rejected.")
    ],
    "split": Annotated[str | None, typer.Option(help="Split of a data set that has several, such as train; or all.")],
    "token_dtype": Annotated[
        str | None, typer.Option(help="uint16 or uint32, of .bin files of tokens. Default: by the vocabulary.")
    ],
}


def reading(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags that say how records are read; it takes them together, as ``reading``."""
    own = inspect.signature(command)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in READING.items()
    ]

    @wraps(command)
    def given(**values: Any) -> None:
        command(reading={name: values.pop(name) for name in READING}, **values)

    kept = [parameter for name, parameter in own.parameters.items() if name != "reading"]
    given.__signature__ = own.replace(parameters=[*kept, *added])  # pyright: ignore - what typer looks at
    given.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *added]}
    return given


Base = Annotated[str | None, typer.Option(help="Base of an adapter, where it is not the one that the adapter names.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or name of the tokenizer, where MODEL has none.")]


def opens_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags ``--base`` and ``--tokenizer``; its ``model`` is typed as text and comes as a :class:`Place`.

    One that takes ``reading`` gets the flags of `reading` too.
    """
    command = reading(command) if "reading" in inspect.signature(command).parameters else command

    @wraps(command)
    def opened(*, model: Any, base: str | None = None, tokenizer: str | None = None, **given: Any) -> None:
        command(model=Place(model or "", base, tokenizer), **given)

    own = inspect.signature(command).parameters
    _, told = get_args(own["model"].annotation)
    required = own["model"].default is inspect.Parameter.empty
    typed = {"model": Annotated[str, told] if required else Annotated[str | None, told]}
    more = {"base": Base, "tokenizer": Tokenizer}
    kind = inspect.Parameter.KEYWORD_ONLY
    known = [x.replace(kind=kind, annotation=typed.get(x.name, x.annotation)) for x in own.values()]
    added = [inspect.Parameter(name, kind, default=None, annotation=what) for name, what in more.items()]
    opened.__signature__ = inspect.Signature([*known, *added])  # type: ignore[attr-defined]
    opened.__annotations__ = command.__annotations__ | typed | more
    return opened
