"""Tasks with labels: classes, yes or no, numbers; for any module, and for the models of ``transformers`` that have such a head.

Axes: N examples, T positions, L = N T of them in all, M of these with loss, C outputs, K numbers of an example.

``inputs`` hold the labels as ``y``, ``labels`` or ``label``.  What goes into the module is ``x``, as ``module(x)``; or
without an ``x`` all else by its name, as ``module(input_ids=.., attention_mask=..)``.  Out comes a tensor, or ``logits``.
"""

import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upriver.errors import ModelError
from upriver.model.capture import frozen
from upriver.model.losses import Sampler, Task, sample, unit, wide
from upriver.model.packed import floating
from upriver.tensors import sent
from upriver.text.batch import Batch, Sequences

LABELS = ("y", "labels", "label")
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
IGNORED = -100  # a label that carries no loss, as in torch and transformers


class Labelled(Task):
    """What tasks with labels have in common: how the module is called, and which positions are real."""

    by_position = False  # whether labels of as many columns as tokens are one for each

    def arranged(self, module: nn.Module, batch: Batch) -> Batch:
        return padded(module, batch, self.by_position)

    def _outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        return logits(module, {name: x for name, x in batch.inputs.items() if name not in LABELS}, batch)


class Classification(Labelled):
    """Softmax cross-entropy of logits ``[N, C]`` with whole numbers ``y`` ``[N]``; or by position, ``[N, T, C]`` with ``[N, T]``.

    The label -100 carries no loss: so token classification, masked language models and encoder-decoders are this task too.
    The loss of an example is the **sum** over its positions, the measurement the log-probability of its labels.

    Example:
        >>> model = up.Model(BertForSequenceClassification.from_pretrained("bert"), task=up.Classification())
    """

    name = "classification"
    by_position = True

    def loss(self, module: nn.Module, batch: Batch, sampler: Sampler | None = None) -> Tensor:
        outputs_LC, y_L = self._predicted(module, batch)
        if sampler is not None:
            u_L = sent(sampler.uniform(len(y_L) // len(batch.rows_N)).flatten(), y_L.device)
            y_L = sample(outputs_LC.detach(), u_L).where(y_L != IGNORED, y_L)
        return F.cross_entropy(outputs_LC, y_L, reduction="sum", ignore_index=IGNORED)

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        outputs_LC, y_L = self._predicted(module, batch)
        losses_L = F.cross_entropy(outputs_LC, y_L, reduction="none", ignore_index=IGNORED)
        return losses_L.view(len(batch.rows_N), -1).sum(1)

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        return -self.losses(module, batch)

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        outputs_LC, y_L = self._predicted(module, batch)
        return outputs_LC[y_L != IGNORED]

    def loss_of(self, outputs_MC: Tensor, batch: Batch) -> Tensor:
        y = _labels(batch)[1].flatten()
        return F.cross_entropy(outputs_MC, y[y != IGNORED].long(), reduction="sum")

    def root(self, outputs_NC: Tensor, k: int) -> Tensor:
        p_NC = outputs_NC.softmax(1)
        return p_NC[:, k : k + 1].sqrt() * (p_NC - unit(k, p_NC))

    def check(self, module: nn.Module, data: Sequences) -> None:
        name, y = _held(data)
        if y is None:
            return
        if y.is_floating_point() or (y.dtype == torch.bool and y.ndim > 1):
            raise ModelError(
                f"classes are whole numbers from 0: got {name!r} of {y.dtype}; encode them, or take up.BinaryClassification for "
                "several yes or no"
            )
        if int(y.min()) < 0 and set(y[y < 0].unique().tolist()) != {IGNORED}:
            raise ModelError(
                f"classes are whole numbers from 0: got {int(y.min())} in {name!r}; {IGNORED} is for no loss"
            )
        if not bool((y != IGNORED).any()):
            raise ModelError(f"no label carries loss: got {IGNORED} alone in {name!r}")
        first = int((y.flatten(1) if y.ndim > 1 else y[:, None]).ne(IGNORED).any(1).nonzero()[0])
        with frozen(module), torch.no_grad():
            C = self.outputs(module, data.batch(np.array([first])).to(next(module.parameters()).device)).shape[1]
        if int(y.max()) >= C:
            raise ModelError(
                f"classes are from 0 to {C - 1}, as many as the model has outputs: got {int(y.max())} in {name!r}; renumber them"
            )

    def _predicted(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[L, C]`` and labels of all positions, also of those without loss."""
        found, (name, y) = self._outputs(module, batch), _labels(batch)
        if found.shape[:-1] != y.shape:
            raise ModelError(
                f"predictions and labels differ in form: got logits of shape {list(found.shape)}, {name!r} of {list(y.shape)}; "
                "classes are the last axis of the logits, and every other position has a label"
            )
        return wide(found).flatten(0, -2), y.flatten().long()


class BinaryClassification(Labelled):
    """Yes or no, once or several times an example: logistic loss of ``[N]``, ``[N, 1]`` or ``[N, K]`` with ``y`` of 0 and 1.

    The loss is summed over the ``K`` labels, the measurement is the log-probability of all of them.
    """

    name = "binary classification"

    def loss(self, module: nn.Module, batch: Batch, sampler: Sampler | None = None) -> Tensor:
        outputs_NK, y_NK = self._predicted(module, batch)
        if sampler is not None:
            u_NK = sent(sampler.uniform(1, outputs_NK.shape[1])[:, 0], outputs_NK.device)
            y_NK = (u_NK < outputs_NK.detach().double().sigmoid()).to(outputs_NK)
        return F.binary_cross_entropy_with_logits(outputs_NK, y_NK, reduction="sum")

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        outputs_NK, y_NK = self._predicted(module, batch)
        return F.binary_cross_entropy_with_logits(outputs_NK, y_NK, reduction="none").sum(1)

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        return -self.losses(module, batch)

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        return self._predicted(module, batch)[0]

    def loss_of(self, outputs_NK: Tensor, batch: Batch) -> Tensor:
        y_NK = _labels(batch)[1].reshape(outputs_NK.shape).to(outputs_NK)
        return F.binary_cross_entropy_with_logits(outputs_NK, y_NK, reduction="sum")

    def root(self, outputs_NK: Tensor, k: int) -> Tensor:
        p_NK = outputs_NK.sigmoid()
        return (p_NK * (1 - p_NK)).sqrt() * unit(k, p_NK)

    def check(self, module: nn.Module, data: Sequences) -> None:
        name, y = _held(data)
        if y is not None and not bool(((y == 0) | (y == 1)).all()):
            odd = y[(y != 0) & (y != 1)].flatten()[0]
            raise ModelError(f"labels are 0 or 1: got {odd.item():g} in {name!r}; give yes as 1 and no as 0")

    def _predicted(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return alike(self._outputs(module, batch), batch)


class Regression(Labelled):
    """``(y - module(x))^2 / 2`` summed over outputs, ``y`` of ``[N]`` or ``[N, K]``.

    Its Fisher is that of a normal distribution of unit variance around the prediction.  The measurement is minus the loss.
    """

    name = "regression"

    def loss(self, module: nn.Module, batch: Batch, sampler: Sampler | None = None) -> Tensor:
        error_NK = self._error(self.outputs(module, batch), batch)
        if sampler is not None:
            noise_NK = sent(torch.special.ndtri(sampler.uniform(1, error_NK.shape[1])[:, 0]), error_NK.device)
            error_NK = error_NK - error_NK.detach() + noise_NK.to(error_NK)
        return error_NK.square().sum() / 2

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        return self._error(self.outputs(module, batch), batch).square().sum(1) / 2

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        return -self._error(self.outputs(module, batch), batch).square().sum(1) / 2

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        return self._outputs(module, batch).reshape(len(batch.rows_N), -1)

    def loss_of(self, outputs_MC: Tensor, batch: Batch) -> Tensor:
        return self._error(outputs_MC, batch).square().sum() / 2

    def root(self, outputs_NC: Tensor, k: int) -> Tensor:
        return unit(k, outputs_NC).expand_as(outputs_NC)

    def check(self, module: nn.Module, data: Sequences) -> None:
        name, y = _held(data)
        if y is not None and y.is_floating_point() and not bool(y.isfinite().all()):
            raise ModelError(f"labels are finite numbers: got NaN or infinity in {name!r}; leave such examples out")

    def _error(self, prediction_NK: Tensor, batch: Batch) -> Tensor:
        prediction_NK, y_NK = alike(prediction_NK, batch)
        return prediction_NK - y_NK


def alike(found: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions and labels as ``[N, K]`` each.

    Raises:
        ModelError: they differ in form; torch would repeat one of them.
    """
    (name, y), N = _labels(batch), len(batch.rows_N)
    found_NK, y_NK = wide(found).reshape(N, -1), y.reshape(N, -1)
    if y_NK.shape != found_NK.shape:
        raise ModelError(
            f"predictions and labels differ in form: got {found_NK.shape[1]} numbers for each example from the model, "
            f"{y_NK.shape[1]} in {name!r}; give as many labels as the model has outputs"
        )
    return found_NK, y_NK.to(found_NK)


def _labels(batch: Batch) -> tuple[str, Tensor]:
    """The labels of a batch with the name that they stand under."""
    found = [name for name in LABELS if name in batch.inputs]
    if len(found) != 1:
        raise ModelError(
            f"labels stand under one of the names {', '.join(map(repr, LABELS))}: got {', '.join(map(repr, batch.inputs))}; "
            "rename the column of labels"
        )
    return found[0], batch.inputs[found[0]]


def _held(data: Sequences) -> tuple[str, Any]:
    """All labels of examples, with their name; None of a corpus that holds none."""
    return _labels(data.batch(np.arange(len(data)))) if len(data) and hasattr(data, "inputs") else ("", None)


# ---- calling a module


def logits(module: nn.Module, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """What a module predicts of named inputs, in the type that it computes in.

    Raises:
        ModelError: it gives no tensor and no ``logits``, or needs a token for padding and names none.
    """
    own = next((p.dtype for p in floating(module)), torch.float32)
    given = {name: x.to(own) if x.is_floating_point() else x for name, x in inputs.items()}
    if "x" in given:  # what stands beside it is a task's own
        found = module(given["x"])
    else:
        given = {name: x.long() if x.dtype == torch.int32 else x for name, x in given.items()}
        if _decodes(module) and "decoder_input_ids" not in given:
            shifted: Any = module.prepare_decoder_input_ids_from_labels
            given["decoder_input_ids"] = shifted(labels=_labels(batch)[1].long())
        found = _called(module, given)
    found = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the predictions of {type(module).__name__} are not known: it gives no tensor and nothing named logits; give a "
            "model with a head, or a task of your own"
        )
    return found


def _called(module: Any, given: dict[str, Tensor]) -> Any:
    config = getattr(module, "config", None)
    pad, mask_NT = getattr(config, "pad_token_id", None), given.get("attention_mask")
    if config is not None:  # as the Trainer of transformers: what the model does not take is left out
        taken = inspect.signature(module.forward).parameters
        given = {name: x for name, x in given.items() if name in taken}
        if "use_cache" in taken:
            given["use_cache"] = False  # type: ignore[assignment]
    if pad is not None and mask_NT is not None and "input_ids" in given:  # the last token is found by it
        given["input_ids"] = given["input_ids"].where(mask_NT.bool(), pad)
    try:
        return module(**given)
    except ValueError as error:
        if "padding token" not in str(error):
            raise
        raise ModelError(
            f"{type(module).__name__} does not know which tokens are padding: got no pad_token_id in its configuration; set "
            "model.module.config.pad_token_id to that which it was trained with"
        ) from error


def _decodes(module: Any) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


# ---- padding


def padded(module: nn.Module, batch: Batch, labelled: bool) -> Batch:
    """The batch without columns that are padding in all of its rows, and with masks of what is real.

    Args:
        labelled: whether positions have labels, which are cut with them.

    An encoder-decoder has two masks, one for each side; their lengths are made such that a layer's positions tell its side.
    """
    mask_NT = batch.inputs.get("attention_mask")
    if mask_NT is None or mask_NT.ndim != 2:
        return batch
    two, width = _decodes(module), mask_NT.shape[1]
    tokens = {name for name, x in batch.inputs.items() if name.endswith(TOKENS) and x.ndim == 2}
    labels = {name for name in LABELS if labelled and name in batch.inputs}
    theirs = {name for name in tokens if name.startswith("decoder_")} | (labels if two else set())
    ours = {name for name in (tokens | labels) - theirs if batch.inputs[name].shape[1:] == (width,)}
    groups = [(mask_NT.bool(), ours)]
    if two:
        own = batch.inputs.get("decoder_attention_mask")
        real_NT = own.bool() if own is not None else _until_last(_labels(batch)[1] != IGNORED)
        groups.append((real_NT, theirs))
    T_G = [max(1, int(real.any(0).nonzero().max()) + 1) if bool(real.any()) else 1 for real, _ in groups]
    T_G[0] = T_G[0] if "input_ids" in ours else width  # embeddings are not cut
    if two:
        T_G = [max(T, 2) for T in T_G]
        if max(T_G) % min(T_G) == 0:
            T_G[T_G.index(max(T_G))] += 1
    inputs, masks = dict(batch.inputs), []
    for (real_NT, names), T in zip(groups, T_G, strict=True):
        masks.append(_wide_as(real_NT, T, 0))
        for name in names:
            inputs[name] = _wide_as(inputs[name], T, IGNORED if name in LABELS else 0)
    return Batch(batch.rows_N, batch.keys_N, inputs, None, batch.weight_N, batch.query_N, tuple(masks))


def _until_last(there_NT: Tensor) -> Tensor:
    """True up to the last place of each row that is true."""
    return there_NT.int().flip(1).cummax(1).values.flip(1).bool()


def _wide_as(x_NT: Tensor, T: int, fill: int) -> Tensor:
    return F.pad(x_NT, (0, T - x_NT.shape[1]), value=fill) if x_NT.shape[1] < T else x_NT[:, :T].contiguous()
