"""The arguments and flags of the command line, each with its help."""

from pathlib import Path
from typing import Annotated

import typer

from upriver.runtime.config import CURVATURES

ModelArg = Annotated[str, typer.Argument(help="A Hugging Face folder or name, or a .gguf file.", metavar="MODEL")]
CorpusArg = Annotated[
    str,
    typer.Argument(help="JSONL, Parquet, CSV, text file or folder, or a `datasets` folder or name.", metavar="CORPUS"),
]
QueriesArg = Annotated[
    str,
    typer.Argument(
        help="JSONL, JSON, CSV or Parquet with id, prompt, completion; or the log of an evaluation.", metavar="QUERIES"
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
Layers = Annotated[str, typer.Option(help="mlp, attention, all, or globs separated by commas.")]
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
    int,
    typer.Option(help="Steps of conjugate gradients from that solution, on the exact Gauss-Newton matrix.", min=0),
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
    str | None, typer.Option(help="As for fit, where there are no factors. Default: those of the factors, or mlp.")
]
TraceSeqLen = Annotated[
    int | None, typer.Option(help="As for fit. Default: as the factors were fitted, or 512.", min=2)
]
TraceBatchTokens = Annotated[int | None, typer.Option(help="As for fit. Default: that of the factors.", min=1)]
TraceSeed = Annotated[int | None, typer.Option(help="As for fit. Default: that of the factors.", min=0)]
