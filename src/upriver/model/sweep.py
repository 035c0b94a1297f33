"""One pass over part of a corpus: batches in, ``consume(layer, a_NTI, g_NTO)`` out."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from upriver.errors import ModelError
from upriver.model.capture import capture, frozen
from upriver.model.check import checked_layers
from upriver.model.kept import Kept
from upriver.model.layers import Layer, find_layers
from upriver.model.load import Model, check_causal
from upriver.model.losses import LanguageModel, Sampler
from upriver.runtime.passes import UNIT_TOKENS, doublings
from upriver.text.batch import Batch, Sequences

CHECKED = 8  # tokens of the sequence that layers are checked on: with fewer, attention has little to show
LOOKED_AT = 64  # short sequences, for two that have loss
APART, TINY = 0.1, 1e-6  # of the size of a loss; a size of which nothing can be said
NARROW_APART, NARROW_TINY = 0.4, 1e-4  # in bfloat16, where another label may be drawn; a mean is off by a half
RULE = "give a sum over sequences and tokens, never a mean"


class Consumer(Protocol):
    def begin(self, batch: Batch) -> None: ...
    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None: ...


class Labels(NamedTuple):
    """Whose labels the loss takes: the corpus's own (``stream`` None), or drawn from the model."""

    seed: int = 0
    stream: int | None = None

    def sampler(self, batch: Batch) -> Sampler | None:
        return None if self.stream is None else Sampler(self.seed, self.stream, batch.keys_N)


def tracked_layers(model: Model, data: Sequences, spec: str) -> list[Layer]:
    """The layers that ``spec`` names, checked on one short sequence, with those that share an input marked."""
    layers, batch = find_layers(model.module, spec), data.batch(_short(data)).to(model.device)
    model.task.prepare(model.module)
    T = model.task.positions(batch)
    return checked_layers(model.module, layers, 1, T, lambda: model.task.loss(model.module, batch))


def _short(data: Sequences) -> np.ndarray:
    """A sequence with loss, where some short one has any: the shortest of ``CHECKED`` tokens or more, else the longest."""
    rows = _with_loss(data)
    enough = rows[data.lengths_N[rows] >= CHECKED]
    return enough[:1] if len(enough) else rows[-1:] if len(rows) else np.array([int(np.argmin(data.lengths_N))])


def check_length(model: Model, data: Sequences) -> None:
    """Refuse sequences that the model does not take, and those that change what it makes of others in their batch.

    Raises:
        ModelError: with the length that is allowed.
    """
    longest, positions, limit = int(np.max(data.lengths_N)), model.positions, model.rotary_limit
    if positions and longest > positions:
        raise ModelError(
            f"the corpus has sequences of {longest} tokens and the model takes {positions}; read it with --seq-len {positions}"
        )
    if limit and longest > limit:
        raise ModelError(
            f"scores would depend on the batches: got sequences of {longest} tokens, and beyond {limit} the model takes other "
            f"rotary frequencies for all that stands in a batch; give --seq-len {limit} or less"
        )


def check_loss(model: Model, data: Sequences, drawn: bool) -> None:
    """Refuse a task whose loss is no sum over sequences, or draws no labels where it should; tried on two short sequences.

    A language model must be causal besides.

    Raises:
        ModelError: with the rule that is broken.
    """
    if isinstance(model.task, LanguageModel):
        check_causal(model.module)
    rows = _with_loss(data)[:2]
    with frozen(model.module), torch.no_grad():
        for labels in (Labels(), Labels(stream=1))[: 1 + drawn]:
            each = [_loss(model, data, rows[[i]], labels) for i in range(len(rows))]
            if len(rows) == 2:
                _check_sum(model, _loss(model, data, rows, labels), each, labels)


def _with_loss(data: Sequences) -> np.ndarray:
    """Some short sequences of more than one token, where there are any, that have a token to predict."""
    several = np.flatnonzero(data.lengths_N > min(1, int(np.max(data.lengths_N)) - 1))
    rows = several[np.argsort(data.lengths_N[several], kind="stable")[:LOOKED_AT]]
    batch = data.batch(rows)
    if batch.real_NT is None or "loss" not in batch.inputs:
        return rows
    return rows[batch.inputs["loss"][:, 1:].any(1).cpu().numpy()]


def _loss(model: Model, data: Sequences, rows: np.ndarray, labels: Labels) -> float:
    batch = data.batch(rows).to(model.device)
    sampler = labels.sampler(batch)
    loss = model.task.loss(model.module, batch, sampler)
    if sampler is not None and not sampler.asked:
        raise ModelError(
            f"the task draws no labels: got {type(model.task).__name__}.loss, which asks its sampler for no number; draw them "
            "by sampler.uniform, or fit with empirical labels (fisher='empirical')"
        )
    if loss.numel() != 1:
        raise ModelError(f"the loss of a batch is not one number: got the shape {tuple(loss.shape)}; {RULE}")
    return float(loss)


def _check_sum(model: Model, together: float, each: list[float], labels: Labels) -> None:
    size = max(abs(together), sum(map(abs, each)))
    apart, tiny = (APART, TINY) if model.dtype.itemsize > 2 else (NARROW_APART, NARROW_TINY)
    if size > tiny and abs(together - sum(each)) > apart * size:
        drawn = "" if labels.stream is None else ", with labels drawn by the sampler's numbers alone"
        raise ModelError(
            f"the loss of two sequences together is not that of one plus that of the other: got {together:.4g} from "
            f"{type(model.task).__name__}.loss, not {sum(each):.4g}; {RULE}{drawn}"
        )


def sweep(
    model: Model,
    layers: list[Layer],
    data: Sequences,
    batches: list[np.ndarray],
    consumer: Consumer,
    labels: Labels = Labels(),  # noqa: B008 - immutable
    advance: Callable[[int], None] = lambda tokens: None,
    kept: Kept | None = None,
) -> None:
    """Run every batch forward and backward, and let ``consumer`` see each layer of each batch.

    Args:
        kept: batches that it holds are read instead (of the same labels); the others are written there.
    """
    recorder = kept.recorder(labels, layers, consumer) if kept is not None else None
    seen = kept.layers if kept and recorder else layers
    with capture(model.module, seen, recorder or consumer, model.handed) as run:
        for rows, batch in zip(batches, _ahead(model, data, batches), strict=True):
            consumer.begin(batch)
            if kept is not None and kept.holds(labels, rows):
                for layer, a_NTI, g_NTO in kept.read(labels, rows, layers):
                    consumer(layer, a_NTI.to(model.device), g_NTO.to(model.device))
            else:
                sampler = labels.sampler(batch)
                if recorder:
                    recorder.begin()
                run(
                    len(rows),
                    model.task.positions(batch),
                    lambda b=batch, s=sampler: model.task.loss(model.module, b, s),
                )
                if recorder:
                    recorder.end(rows)
            advance(int(data.lengths_N[rows].sum()))


def _ahead(model: Model, data: Sequences, batches: list[np.ndarray]) -> Iterator[Batch]:
    """The batches in order, each read and moved to the device while the one before it is computed."""

    def read(rows: np.ndarray) -> Batch:
        return data.batch(rows).to(model.device)

    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, rows) for rows in batches[:1]]
        for following in [*batches, None][1:]:
            ready = coming.pop()
            if following is not None:
                coming.append(reader.submit(read, following))
            yield ready.result()


def tokens_of(data: Sequences, units: list[list[np.ndarray]]) -> int:
    return sum(int(data.lengths_N[rows].sum()) for unit in units for rows in unit)


def doubled(data: Sequences, max_tokens: int, seed: int) -> list[np.ndarray]:
    """What each round adds to a sample of ``UNIT_TOKENS`` tokens that doubles up to ``max_tokens``: sorted rows.

    They are drawn by the sequences' keys, so they depend neither on the batches nor on where a sequence stands.
    """
    nested = [data.sample(int(size), seed) for size in doublings(max_tokens, UNIT_TOKENS)]
    added = [np.setdiff1d(rows, before) for before, rows in pairwise([nested[0][:0], *nested])]
    return [rows for rows in added if len(rows)]


def split_units(batches: list[np.ndarray], lengths_N: np.ndarray, most: int | None = None) -> list[list[np.ndarray]]:
    """Consecutive batches in units of about ``UNIT_TOKENS`` tokens, and at most ``most`` sequences where that is given."""
    units: list[list[np.ndarray]] = []
    tokens_left, rows_left = 0, 0
    for rows in batches:
        tokens = int(lengths_N[rows].sum())
        if tokens > tokens_left or len(rows) > rows_left:
            units.append([])
            tokens_left, rows_left = UNIT_TOKENS, most or len(lengths_N)
        units[-1].append(rows)
        tokens_left, rows_left = tokens_left - tokens, rows_left - len(rows)
    return units
