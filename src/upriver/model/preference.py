"""Preference pairs: direct preference optimisation and reward models, where an example is a chosen and a rejected answer.

Axes: N pairs, T positions of the two answers padded to one length.

``inputs`` have the names of TRL: ``chosen_input_ids``, ``chosen_attention_mask``, ``chosen_labels`` (-100 at the prompt), the
same of ``rejected_``, and for direct preference optimisation ``reference_chosen_logps`` and ``reference_rejected_logps``.
:func:`preference_examples` makes them of texts.  The model is called once with each answer, so a layer sees both: its gradient of
a pair is the sum over the two.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upriver.errors import CorpusError, ModelError
from upriver.model.capture import frozen
from upriver.model.losses import LanguageModel, Sampler, Task, wide
from upriver.model.model import Model
from upriver.model.tasks import IGNORED, logits
from upriver.tensors import sent
from upriver.text.batch import Batch, Sequences
from upriver.text.examples import Examples
from upriver.text.reading import Reading
from upriver.text.records import BadRecords, Record
from upriver.text.shapes import BadRowError, shaped
from upriver.text.tokenise import documents

SIDES = ("chosen", "rejected")
REFERENCES = tuple(f"reference_{side}_logps" for side in SIDES)


class Pairs(Task):
    """What tasks of pairs have in common: the logistic loss ``-log sigmoid(h)`` of how far the chosen answer is ahead."""

    def ahead(self, module: nn.Module, batch: Batch) -> Tensor:
        """``h`` of each pair, ``[N]``."""
        raise NotImplementedError

    def arranged(self, module: nn.Module, batch: Batch) -> Batch:
        if "chosen_input_ids" not in batch.inputs:
            return batch
        real = [_mask(batch, side) for side in SIDES]
        T = max([1, *(int(x.any(0).nonzero().max()) + 1 for x in real if bool(x.any()))])
        inputs = dict(batch.inputs)
        for side in SIDES:
            for name in ("input_ids", "attention_mask", "labels"):
                if (full := f"{side}_{name}") in inputs:
                    x_NT = inputs[full][:, :T]
                    inputs[full] = F.pad(x_NT, (0, T - x_NT.shape[1]), value=IGNORED if name == "labels" else 0)
        mask_NT = torch.cat([F.pad(x[:, :T], (0, max(0, T - x.shape[1]))) for x in real], 1)  # the two calls of a layer
        return Batch(batch.rows_N, batch.keys_N, inputs, None, batch.weight_N, batch.query_N, (mask_NT,))

    def loss(self, module: nn.Module, batch: Batch, sampler: Sampler | None = None) -> Tensor:
        h_N = self.ahead(module, batch)
        if sampler is not None:  # which of the two is preferred is drawn
            u_N = sent(sampler.uniform(1)[:, 0, 0], h_N.device)
            h_N = h_N.where(u_N < h_N.detach().double().sigmoid(), -h_N)
        return F.softplus(-h_N).sum()

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        return F.softplus(-self.ahead(module, batch))

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        return -self.losses(module, batch)

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        return self.ahead(module, batch)[:, None]

    def loss_of(self, outputs_NC: Tensor, batch: Batch) -> Tensor:
        return F.softplus(-outputs_NC).sum()

    def root(self, outputs_NC: Tensor, k: int) -> Tensor:
        p_NC = outputs_NC.sigmoid()
        return (p_NC * (1 - p_NC)).sqrt()

    def check(self, module: nn.Module, data: Sequences) -> None:
        wanted = [f"{side}_input_ids" for side in SIDES]
        held = getattr(data, "inputs", {})
        if lacking := [name for name in wanted if name not in held]:
            raise ModelError(
                f"no preference pairs: the columns lack {', '.join(lacking)}; make them by up.preference_examples"
            )


class Preference(Pairs):
    """Direct preference optimisation (Rafailov et al. 2023): ``h = beta (log p - log p_ref)(chosen) - the same of the rejected``.

    The measurement of a pair is ``log sigmoid(h)``; asked by :class:`upriver.Queries`, it is the log-probability of the answer as
    for a language model: which pairs made the model say that?

    Args:
        beta: as in training.

    Example:
        >>> pairs = up.preference_examples(records, model.tokenizer, reference=before)
        >>> factors = up.fit(
        ...     up.Model(model.module, model.tokenizer, up.Preference(beta=0.1)), pairs, out="factors", layers="mlp"
        ... )
    """

    name = "direct preference optimisation"

    def __init__(self, beta: float = 0.1):
        self.beta = beta

    def ahead(self, module: nn.Module, batch: Batch) -> Tensor:
        if lacking := [name for name in REFERENCES if name not in batch.inputs]:
            raise ModelError(
                f"the pairs do not say what the reference model gives them: got no {', '.join(lacking)}; make them by "
                "up.preference_examples(records, tokenizer, reference=the model before)"
            )
        own_N, theirs_N = (answer_log_probs(module, batch, side) for side in SIDES)
        references = [batch.inputs[name].to(own_N) for name in REFERENCES]
        return self.beta * ((own_N - references[0]) - (theirs_N - references[1]))

    def positions(self, batch: Batch) -> int | None:
        return batch.inputs["tokens"].shape[1] if "tokens" in batch.inputs else None

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        if "tokens" in batch.inputs:
            return LanguageModel().measurement(module, batch)
        return super().measurement(module, batch)


class Reward(Pairs):
    """A reward model by Bradley and Terry: ``h = r(chosen) - r(rejected)``, of a sequence classifier with one output.

    The measurement is ``log sigmoid(h)``.
    """

    name = "reward model"

    def ahead(self, module: nn.Module, batch: Batch) -> Tensor:
        chosen_N, rejected_N = (self._reward(module, batch, side) for side in SIDES)
        return chosen_N - rejected_N

    def _reward(self, module: nn.Module, batch: Batch, side: str) -> Tensor:
        given = {name: batch.inputs[f"{side}_{name}"] for name in ("input_ids", "attention_mask")}
        found = wide(logits(module, given, batch))
        if found.shape not in ((len(batch.rows_N),), (len(batch.rows_N), 1)):
            raise ModelError(
                f"a reward model gives one number for an answer: got logits of shape {list(found.shape)} for "
                f"{len(batch.rows_N)} answers; load it with num_labels=1"
            )
        return found.flatten()


def answer_log_probs(module: nn.Module, batch: Batch, side: str) -> Tensor:
    """``log p(answer | prompt)`` of the ``chosen`` or ``rejected`` answers, summed over their tokens, ``[N]``."""
    given = {name: batch.inputs[f"{side}_{name}"] for name in ("input_ids", "attention_mask")}
    labels_NT, logits_NTV = batch.inputs[f"{side}_labels"][:, 1:].long(), wide(logits(module, given, batch))[:, :-1]
    return -F.cross_entropy(logits_NTV.mT, labels_NT, ignore_index=IGNORED, reduction="none").sum(1)


def _mask(batch: Batch, side: str) -> Tensor:
    return batch.inputs[f"{side}_attention_mask"].bool()


def preference_examples(
    records: Iterable[dict[str, Any]],
    tokenizer: Any,
    reference: Model | nn.Module | None = None,
    seq_len: int | None = None,
) -> Examples:
    """Pairs of records with ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages for the chat template.

    Args:
        reference: the model before training, whose log-probabilities of both answers are added (for :class:`Preference`).
        seq_len: tokens of an answer with its prompt at most; a longer pair is refused.

    Raises:
        CorpusError: a record that is no such pair, with its number.

    Example:
        >>> up.preference_examples(
        ...     [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}], tokenizer, reference=before
        ... )
    """
    columns: dict[str, list[Any]] = {f"{side}_{name}": [] for side in SIDES for name in ("input_ids", "labels")}
    for number, record in enumerate(records):
        for side in SIDES:
            tokens_T, loss_T = _answer(record, side, tokenizer, number)
            if seq_len is not None and len(tokens_T) > seq_len:
                raise CorpusError(
                    f"record {number}: a pair is not cut: got {len(tokens_T)} tokens of the {side} answer with its prompt, and "
                    f"seq_len is {seq_len}; leave it out, or allow as many"
                )
            columns[f"{side}_input_ids"].append(tokens_T)
            columns[f"{side}_labels"].append(np.where(loss_T, tokens_T, IGNORED))
    masks = {
        f"{side}_attention_mask": [np.ones(len(x), np.int32) for x in columns[f"{side}_input_ids"]] for side in SIDES
    }
    if not columns["chosen_input_ids"]:
        raise CorpusError("no preference pair: got no record; give dictionaries with prompt, chosen and rejected")
    found = Examples({**columns, **masks})
    return found if reference is None else _with_reference(found, reference)


def _answer(record: dict[str, Any], side: str, tokenizer: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        shape = shaped(record, Reading(completion_field=side))
    except BadRowError as reason:
        raise CorpusError(f"record {number} is no preference pair: {reason}") from reason
    made = Record(str(number), 0, shape.parts, {}, f"record {number}")
    document = next(documents([made], tokenizer, BadRecords()))[-1]
    return document.encoded.tokens_T, document.loss_T


@torch.no_grad()
def _with_reference(pairs: Examples, reference: Model | nn.Module) -> Examples:
    module: nn.Module = reference.module if isinstance(reference, Model) else reference
    device, found = next(module.parameters()).device, {name: [] for name in REFERENCES}
    with frozen(module):
        for n in range(len(pairs)):
            batch = Preference().arranged(module, pairs.batch(np.array([n]))).to(device)
            for name, side in zip(REFERENCES, SIDES, strict=True):
                found[name].append(answer_log_probs(module, batch, side).double().cpu())
    return Examples({**pairs.inputs, **{name: torch.cat(x) for name, x in found.items()}})
