"""Deterministic training of small models, as a function of the weight that each example has in the loss.

    theta <- theta - rate * (direction of  1/B sum over the batch of w_n grad L(z_n) + weight decay)

Retraining and metagradients stand on the same steps, so that one can be checked by the other.
Axes: N sequences, B of them in a batch, P parameters (all that the module has, each laid flat).
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from upriver.curvature.products import Replaced
from upriver.errors import ConfigError, ModelError, NumericalError
from upriver.model.capture import frozen
from upriver.model.fingerprint import content, measured_by
from upriver.model.model import NOT_HASHED, Model, dtype_named
from upriver.model.weights import converted
from upriver.runtime.artifact import digest
from upriver.text.batch import Batch, Sequences

AGREED = 1e-4  # relative difference of the sum of a task's `losses` from its `loss`


class State(NamedTuple):
    """Where a run stands: weights, and the running means of gradients and of their squares, ``[P]`` each."""

    theta_P: Tensor
    first_P: Tensor
    second_P: Tensor

    @classmethod
    def start(cls, theta_P: Tensor) -> "State":
        return cls(theta_P, torch.zeros_like(theta_P), torch.zeros_like(theta_P))


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: so many steps of Adam (AdamW, where weights decay) or of SGD with momentum.

    The loss of a step is the mean over its sequences.  Adam divides by ``sqrt(v + epsilon^2)``, which has a derivative at zero
    where ``sqrt(v) + epsilon`` has none.

    Attributes:
        batch: sequences in each step, drawn anew in every epoch, by the seed alone; None: all of them.
        decay: ``linear`` lets the rate fall to zero.
        weight_decay: added to the gradient by SGD (so it is ``l2`` of the mean loss), to the step by Adam.
        dtype: to train in; None: that of the model.
    """

    steps: int = 300
    rate: float = 0.01
    batch: int | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    second: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decay: Literal["none", "linear"] = "none"
    dtype: str | None = None

    def __post_init__(self):
        if self.optimizer not in ("adam", "sgd") or self.decay not in ("none", "linear"):
            raise ConfigError(
                f"no such training: got the optimizer {self.optimizer!r} with the decay {self.decay!r}; "
                "give 'adam' or 'sgd', and 'none' or 'linear'"
            )
        if self.steps < 1 or not self.rate > 0 or (self.batch is not None and self.batch < 1):
            raise ConfigError(
                f"a training needs steps, a rate and sequences in a batch: got {self.steps}, {self.rate} and {self.batch}; "
                "give numbers above zero"
            )

    def moved(self, state: State, g_P: Tensor, at: int) -> State:
        """The state after step number ``at``, from 0, along the gradient ``g_P``."""
        rate = self.rate * (1 - at / self.steps if self.decay == "linear" else 1)
        theta_P, first_P, second_P = state
        if self.optimizer == "sgd":
            first_P = self.momentum * first_P + g_P + self.weight_decay * theta_P
            return State(theta_P - rate * first_P, first_P, second_P)
        first_P = self.momentum * first_P + (1 - self.momentum) * g_P
        second_P = self.second * second_P + (1 - self.second) * g_P.square()
        m_P, v_P = first_P / (1 - self.momentum ** (at + 1)), second_P / (1 - self.second ** (at + 1))
        move_P = m_P / (v_P + self.epsilon**2).sqrt() + self.weight_decay * theta_P
        return State(theta_P - rate * move_P, first_P, second_P)

    def batches(self, N: int, seed: int) -> list[np.ndarray]:
        """The rows of every step, when there are ``N``: the same whatever weight they have."""
        if self.batch is None or self.batch >= N:
            return [np.arange(N)] * self.steps
        found: list[np.ndarray] = []
        for epoch in range(-(-self.steps // (N // self.batch))):
            order_N = np.random.default_rng([seed, epoch]).permutation(N)
            found += np.split(order_N[: N - N % self.batch], N // self.batch)
        return found[: self.steps]


class Whole:
    """A model as a function of all of its weights ``theta_P``; shared ones are there once."""

    def __init__(self, model: Model):
        self.model = model
        named = dict(model.module.named_parameters())
        self.shapes = {name: p.shape for name, p in named.items()}
        self.theta_P = torch.cat([p.detach().flatten() for p in named.values()])

    def at(self, theta_P: Tensor) -> Model:
        """The model with the weights ``theta_P``, differentiable in them."""
        parts = theta_P.split([shape.numel() for shape in self.shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return Model(Replaced(self.model.module, weights), self.model.tokenizer, self.model.task)

    def row_losses(self, theta_P: Tensor, batch: Batch) -> Tensor:
        """The loss of each row of a batch, ``[B]``."""
        model = self.at(theta_P)
        return model.task.row_losses(model.module, batch)

    def set(self, theta_P: Tensor) -> Model:
        """The model itself, its weights now ``theta_P``."""
        parts = theta_P.split([shape.numel() for shape in self.shapes.values()])
        with torch.no_grad():
            for p, part in zip(self.model.module.parameters(), parts, strict=True):
                p.copy_(part.view_as(p))
        return self.model

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Frozen, in evaluation mode, attention by plain algebra, which has second derivatives."""
        with frozen(self.model.module), sdpa_kernel(SDPBackend.MATH):
            yield


@dataclass(frozen=True)
class Trainer:
    """Trains a model on some rows of ``data``: ``trainer(rows, seed)``; dropout is off, and equal calls give equal models.

    The batches depend on the seed alone and not on the rows: those that are left out are dropped from them, and the sum over the
    rest is divided by as many sequences as remain in a batch on average.  So two runs of one seed differ by what was left out.

    Args:
        begin: a model, from whose weights every run begins; or a function that makes one from scratch, before whose call torch is
            seeded.  A language model of ``transformers`` will do as any other.
        data: what rows are of.

    Raises:
        ConfigError: rows that there are not.
        ModelError: a task whose `losses` are not the parts of its `loss`.
        NumericalError: the training diverged.

    Example:
        >>> train = up.Trainer(
        ...     lambda: up.Model(net(), task=up.Classification()), examples, up.Recipe(steps=500, batch=64)
        ... )
        >>> model = train(range(100), seed=0)
    """

    begin: Model | Callable[[], Model]
    data: Sequences
    recipe: Recipe = Recipe()

    def __call__(self, rows: np.ndarray, seed: int) -> Model:
        """The model trained on ``rows``."""
        rows, N = np.unique(np.asarray(rows, np.int64)), len(self.data)
        if not len(rows) or rows[0] < 0 or rows[-1] >= N:
            raise ConfigError(f"rows to train on must be some of the {N} there are: got {rows}")
        weight_N = np.zeros(N)
        weight_N[rows] = N / len(rows)
        return self.weighted(weight_N, seed)

    def weighted(self, weight_N: np.ndarray, seed: int) -> Model:
        """The model trained with a weight for the loss of every sequence; those of weight 0 play no part."""
        whole, recipe = self.begun(seed), self.recipe
        w_N = torch.as_tensor(weight_N).to(whole.theta_P)
        state = State.start(whole.theta_P)
        with whole.differentiable():
            for at, rows in enumerate(recipe.batches(len(self.data), seed)):
                kept = rows[np.asarray(weight_N)[rows] != 0]
                state = self.step(whole, state, w_N[kept], kept, at, len(rows))
        return self.ended(whole, state)

    def step(self, whole: Whole, state: State, w_B: Tensor, rows: np.ndarray, at: int, size: int) -> State:
        """One step of the training, over the sequences ``rows`` with the weights ``w_B`` of a batch of ``size``."""
        g_P = torch.zeros_like(state.theta_P)
        if len(rows):
            batch = self.data.batch(rows).to(whole.theta_P.device)
            g_P = grad(lambda theta_P: (w_B * whole.row_losses(theta_P, batch)).sum() / size)(state.theta_P)
        return self.recipe.moved(state, g_P, at)

    def begun(self, seed: int) -> Whole:
        """A copy of the model where training begins."""
        model = self.begin if isinstance(self.begin, Model) else self._made(seed)
        dtype = dtype_named(self.recipe.dtype) if self.recipe.dtype else model.dtype
        module = converted(model.module, dtype)
        whole = Whole(dataclasses.replace(model, module=module, source=None, _hashed=NOT_HASHED))
        self._check(whole)
        return whole

    def ended(self, whole: Whole, state: State) -> Model:
        if not torch.isfinite(state.theta_P).all():
            raise NumericalError(
                f"the training diverged: weights that are no numbers; lower the rate of {self.recipe.rate}"
            )
        return whole.set(state.theta_P)

    @property
    def fingerprint(self) -> str:
        """A hash of beginning, data and recipe; of a function that begins its source, not what it closes over."""
        begin: Any = self.begin
        if isinstance(begin, Model):
            told = [begin.fingerprint, *measured_by(begin.task)]
        else:
            told = content([begin.func, begin.args, begin.keywords] if isinstance(begin, partial) else begin)
        return digest([told, self.data.fingerprint, asdict(self.recipe)])

    def _made(self, seed: int) -> Model:
        assert not isinstance(self.begin, Model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.begin()

    def _check(self, whole: Whole) -> None:
        batch, task = self.data.batch(np.arange(min(2, len(self.data)))).to(whole.theta_P.device), whole.model.task
        with whole.differentiable(), torch.no_grad():
            losses_N, loss = whole.row_losses(whole.theta_P, batch), float(task.loss(whole.model.module, batch))
        if losses_N.shape != batch.rows_N.shape or not abs(float(losses_N.sum()) - loss) <= AGREED * abs(loss) + 1e-6:
            raise ModelError(
                f"the losses of {type(task).__name__} are not the parts of its loss: got {losses_N.tolist()} with the sum "
                f"{loss:.6g}; let `losses(module, batch)` give the loss of each row"
            )
