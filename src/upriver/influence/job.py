"""What a trace works on: what it was given, with what is not named taken from the factors, and its work, once it is divided."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from upriver.curvature.base import Curvature, Damping, Moments
from upriver.curvature.blocks import BlockCurvature
from upriver.curvature.choose import BLOCKS, blocks, needs_factors, solver
from upriver.curvature.combined import Combined
from upriver.curvature.factors import Factors
from upriver.errors import ConfigError, MismatchError
from upriver.influence.queries import Measured
from upriver.model.check import tracked_layers
from upriver.model.layers import Layer
from upriver.model.load import load_model
from upriver.model.model import Model
from upriver.model.packed import any_packed
from upriver.runtime.artifact import Artifact
from upriver.runtime.config import PLAIN_GRADIENTS, SELF, TraceOptions
from upriver.runtime.divide import Division
from upriver.runtime.plan import held_out_tokens
from upriver.runtime.progress import Progress, Say
from upriver.text.batch import Sequences

PRODUCT_TOKENS, MOST_ROOM = 1024, 1 << 30  # of a batch in which products are fastest; bytes that its vectors take
STOP, FEW = 0x85EBCA6B, 8  # a seed of its own; sequences below which an energy tells nothing
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
    solvers: dict[str, Curvature] = field(default_factory=dict)  # by part, each made when it is first needed

    @property
    def exact(self) -> str:
        """The type in which queries are solved and the top is looked at again, where the model fits in it."""
        if any_packed(self.model.module):  # which has but one
            return str(self.model.dtype).removeprefix("torch.")
        fitted = self.factors.options.dtype if self.factors else self.opts.dtype
        return "float64" if "float64" in (fitted, self.opts.dtype) else "float32"

    def tracked(self, model: Model, same: Sequence[Layer] = ()) -> list[Layer]:
        """The layers of one of the models: those of the factors, their second moments in as many blocks, or the ``same`` as of
        another."""
        blocks, names = 1, {x.name for x in same} or None
        if self.factors:
            blocks, names = self.factors.options.blocks, {x.name for x in self.factors.layers}
        return tracked_layers(model, self.data, str(self.opts.layers), blocks, names)

    @cached_property
    def sample(self) -> np.ndarray:
        """The sequences that a matrix-free solver goes over: those of the fit, or some of as many tokens as are asked for."""
        fitted = (
            self.factors.manifest["fit"]["tokens"] if self.factors else int(self.data.lengths_N.sum(dtype=np.int64))
        )
        return self.data.sample(self.opts.combine or self.opts.refine_tokens or fitted, self.opts.seed or 0)

    @cached_property
    def stops(self) -> np.ndarray:
        """The sequences that tell ``--refine auto`` when to stop: some that neither the solver nor the fit goes over, at most
        half of these; the sample itself, where it is the corpus but for a few: then it cannot fit them alone."""
        if self.opts.refine != "auto":
            return np.empty(0, np.int64)
        rest, seed = unseen_rows(self.data, self.factors, self.sample), self.opts.seed or 0
        total = int(np.asarray(self.data.lengths_N)[rest].sum(dtype=np.int64))
        some = of_tokens(self.data, rest, min(held_out_tokens(None, len(self.queries)), total) // 2, [STOP, seed])
        return some if len(some) >= FEW else self.sample

    @property
    def seen(self) -> np.ndarray:
        """What had a part in making the solutions, beside what the factors were fitted on."""
        return np.union1d(self.sample, self.stops)


class Job(NamedTuple):
    """What one trace works on, decided before it starts."""

    stage: Artifact
    model: Model
    layers: list[Layer]
    data: Sequences
    queries: Measured
    factors: Factors | None
    rows: np.ndarray  # the sequences that are scored
    opts: TraceOptions
    progress: Progress
    division: Division
    curvature: Curvature | None = None  # of the model in its exact type
    weight: float = 1.0  # of what is solved: a checkpoint's learning rate
    part: str = ""  # of the folder: a checkpoint

    @property
    def dampings(self) -> list[Damping]:
        undamped = self.opts.curvature in PLAIN_GRADIENTS
        return [Damping(0.0, False)] if undamped else [Damping.parse(text) for text in self.opts.dampings]

    @property
    def columns(self) -> list[str]:
        """The columns of the results: a query each, and again for every further damping, as ``ID@0.01x``."""
        further = self.opts.dampings[1:] if len(self.dampings) > 1 else []
        return [*self.queries.ids, *(f"{name}@{text}" for text in further for name in self.queries.ids)]

    @property
    def norms(self) -> int:
        """For how many dampings the length of each sequence's gradient is measured; 0 without unit-norm scores."""
        return len(self.dampings) * self.opts.unit_norm

    @property
    def table(self) -> list[str]:
        """The columns of ``scores.parquet``: those of the results, and as ``ID@unit`` again with unit-norm scores."""
        units = [*(f"{name}@unit" for name in self.columns), SELF] if self.opts.unit_norm else []
        return [*self.columns, *units]

    @property
    def n_train(self) -> int | None:
        """What turns a raw score into nats: what was given, or the sequences that the factors were fitted for; None for
        gradient dot products."""
        if self.opts.curvature in PLAIN_GRADIENTS:
            return None
        return self.opts.n_train or (self.factors.manifest["n_train"] if self.factors else len(self.data))

    @property
    def rank(self) -> int | None:
        return rank_within(self.layers, self.opts)

    @property
    def by_layer(self) -> BlockCurvature | None:
        """The curvature, where each layer is solved by itself, and so cheaply that it is done again for the second look."""
        return self.curvature if isinstance(self.curvature, BlockCurvature) else None

    def open(self, name: str, **how: Any) -> Artifact:
        """Open an inner stage; one that was begun with another division of the work is begun again."""
        path, kind = self.stage.path / name.split("/")[0] / self.part, name.split("/")[0]
        return Artifact.open(path / name.partition("/")[2], kind, self.stage.key | {"split": how}, overwrite=True)

    def groups(self, name: str) -> list[list[Layer]]:
        """The layers that go through a pass together, each time that it is made."""
        return [[self.layers[i] for i in group] for group in self.division.groups[name]]

    def metric(self, name: str) -> Moments | None:
        """The second moments in which a layer's solutions are compressed; None where nothing was fitted."""
        return self.factors.moments(name).to(self.model.like) if self.factors else None


def rank_within(layers: list[Layer], opts: TraceOptions) -> int | None:
    """The rank asked for, or the highest that a layer can have; None: full."""
    return None if opts.rank == "full" else min(opts.rank, max(min(x.O, x.I) for x in layers))


def unseen_rows(data: Sequences, factors: Factors | None, seen: np.ndarray) -> np.ndarray:
    """The sequences that are not among ``seen``, and that the factors were not fitted on."""
    if factors and factors.manifest["key"]["corpus"] == data.fingerprint:
        seen = np.concatenate([seen, data.sample(factors.manifest["fit"]["tokens"], factors.options.seed)])
    return np.setdiff1d(np.arange(len(data)), seen)


def of_tokens(data: Sequences, rows: np.ndarray, tokens: int, seed: list[int]) -> np.ndarray:
    """Random ones of ``rows``, of at most so many tokens together."""
    drawn = np.random.default_rng(seed).permutation(rows)
    total = np.cumsum(np.asarray(data.lengths_N)[drawn], dtype=np.int64)
    return np.sort(drawn[: np.searchsorted(total, tokens, side="right")])


def settled_options(
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
    if kind in PLAIN_GRADIENTS and opts.n_train:
        raise ConfigError(
            f"curvature {kind!r} gives plain products of gradients, in no unit: got --n-train {opts.n_train}; leave it out"
        )
    if kind in PLAIN_GRADIENTS and (len(opts.dampings) > 1 or opts.refine):
        raise ConfigError(
            f"curvature {kind!r} inverts nothing: got --damping {opts.damping} and --refine {opts.refine}"
        )
    if opts.combine and (kind not in ("ekfac", "kfac", "diagonal") or opts.refine or not factors):
        raise ConfigError(
            f"--combine takes solutions of ekfac, kfac or diagonal, fitted and unrefined: got curvature {kind!r}, --refine "
            f"{opts.refine} and {'factors' if factors else 'no factors'}; leave it out, or choose one of these"
        )
    if opts.unit_norm and (kind not in BLOCKS or opts.refine or opts.combine):
        raise ConfigError(
            f"unit-norm scores need every sequence solved in the pass, which only {', '.join(BLOCKS)} do, unrefined: got "
            f"curvature {kind!r} and --refine {opts.refine}; leave out --unit-norm, or choose one of these"
        )
    told = factors.options if factors else None
    if told and opts.layers not in (None, told.layers):
        raise MismatchError(
            f"the factors were fitted for other layers: got --layers {opts.layers!r} now, {told.layers!r} then; leave it out"
        )
    own = str(model.dtype).removeprefix("torch.")
    missing = {
        "layers": opts.layers or (told.layers if told else model.default_layers),
        "dtype": opts.dtype or (told.dtype if told else own),
        "tf32": opts.tf32 if opts.tf32 is not None else bool(told and told.tf32),
        "seed": opts.seed if opts.seed is not None else (told.seed if told else 0),
    }
    return model.settled(opts.model_copy(update=missing))


def loaded(which: str | Path | Model, like: Model) -> Model:
    """A checkpoint: as it was given, or read from its folder."""
    if isinstance(which, Model):
        return which
    return load_model(which, str(like.dtype).removeprefix("torch."), str(like.device))


def chosen_solver(model: Model, layers: list[Layer], asked: Given, division: Division) -> Curvature:
    """The solver that was asked for; one that goes over all layers at once has half of the room that is left for its products."""
    opts = asked.opts
    kind = "identity" if opts.curvature == "tracincp" else opts.curvature
    how = {"refine": opts.refine, "rank": opts.solver_rank, "steps": opts.solver_steps, "seed": opts.seed}
    given = {name: value for name, value in how.items() if value is not None}
    given |= {"batch_tokens": min(PRODUCT_TOKENS, opts.batch)}
    given |= {"memory_bytes": min(MOST_ROOM, division.room("queries") // 2)}
    if opts.combine:
        start = blocks(kind, layers, asked.factors)
        return Combined(model, layers, asked.data, asked.sample, start, memory_bytes=given["memory_bytes"])
    return solver(kind, model, layers, asked.data, asked.sample, asked.factors, stops=asked.stops, **given)


def jobs(first: Job, asked: Given) -> Iterator[Job]:
    """The work on the model, or on each checkpoint, whose scores add up."""
    for number, (which, weight) in enumerate(asked.checkpoints or [(asked.model, 1.0)]):
        model, layers = loaded(which, asked.model), first.layers
        if model is not asked.model:
            layers = asked.tracked(model, layers)
        if [x[2:] for x in layers] != [x[2:] for x in first.layers]:
            raise ConfigError(
                f"checkpoint {number + 1} has other layers than the model; give one of the same architecture"
            )
        part = f"checkpoint-{number}" if asked.checkpoints else ""
        yield first._replace(model=model, layers=layers, weight=weight, part=part)


@contextmanager
def exactly(job: Job, asked: Given) -> Iterator[Job]:
    """A job in the type of queries and of the second look, with its solver; what layers saw is summed in float32 at least."""
    dtype = job.division.exact
    with job.model.computing_in(dtype, handed=torch.float32 if dtype == "bfloat16" else None) as model:
        own = model.module is job.model.module
        layers = job.layers if own else asked.tracked(model, job.layers)
        chosen = asked.solvers.get(job.part) or chosen_solver(model, layers, asked, job.division)
        if own:
            asked.solvers[job.part] = chosen
        yield job._replace(model=model, layers=layers, curvature=chosen)
