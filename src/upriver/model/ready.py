"""What must hold before a pass: lengths that the model takes, layers that can be tracked, a loss that is a sum."""

import numpy as np
import torch

from upriver.errors import ModelError
from upriver.model.capture import frozen
from upriver.model.check import checked_layers
from upriver.model.layers import Layer, find_layers
from upriver.model.load import Model, check_causal
from upriver.model.losses import LanguageModel
from upriver.model.sweep import Labels
from upriver.text.batch import Sequences

CHECKED = 8  # tokens of the sequence on which layers are checked, at least
LOOKED_AT = 64  # short sequences, for two that have loss
APART, TINY = 0.1, 1e-6  # of the size of a loss; a size of which nothing can be said
NARROW_APART, NARROW_TINY = 0.4, 1e-4  # in bfloat16, where another label may be drawn; a mean is off by a half
RULE = "give a sum over sequences and tokens, never a mean"


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
