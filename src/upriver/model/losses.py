"""What is differentiated: the loss of a training sequence, with given or sampled labels, and the measurement of a query.

Conventions: the loss of a sequence is the **sum** of ``- log p`` over its loss tokens (eq. 22), a measurement is the sum of
``log p`` over the completion's tokens (eq. 24).  Labels of the Fisher are drawn from the model's own predictions (eq. 13), one
per loss position, and never fed back.  The random number of a position depends on (seed, sequence, position, pass) alone, so
factors do not depend on batch size, order, number of ranks, or a resume.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upriver.errors import ModelError
from upriver.model.head import decide_ending, ending, token_losses, whole_logits
from upriver.tensors import sent
from upriver.text.batch import Batch, Sequences, splitmix64

SAMPLE_ROWS = 1024  # positions whose distribution over the vocabulary is held at once
BLOCK = 128  # tokens that are summed up before one of them is drawn
FINE = 2.0**-40  # of a sum of probabilities: what its parts are counted in


class Sampler:
    """Counter-based uniform random numbers in (0, 1) for the sampled labels of one pass over one batch."""

    def __init__(self, seed: int, stream: int, keys_N: np.ndarray):
        salt_1 = np.array([seed], np.uint64) * np.uint64(1_000_003) + np.uint64(stream)
        self._keys_N = splitmix64(keys_N ^ splitmix64(salt_1))
        self.asked = False  # for numbers: a loss that draws no label is the empirical one

    def uniform(self, T: int, K: int = 1) -> Tensor:
        """Float64 ``[N, T, K]``: one number for each sequence, position and component."""
        self.asked = True
        counter = np.arange(T * K, dtype=np.uint64).reshape(1, T, K) * np.uint64(0x9E3779B97F4A7C15)
        bits = splitmix64(self._keys_N[:, None, None] + counter)
        return torch.from_numpy(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


class Task(ABC):
    """What a model is for: gives capture and fit a loss, and trace a measurement.

    Example:
        >>> class Ranking(Task):
        ...     def loss(self, module, batch, sampler=None): ...
        ...     def measurement(self, module, batch): ...
    """

    name: str = ""

    def prepare(self, module: nn.Module) -> None:  # noqa: B027 - most tasks need nothing
        """Find out whatever is needed of a module before its passes begin."""

    def check(self, module: nn.Module, data: Sequences) -> None:  # noqa: B027 - most tasks take what there is
        """Refuse data whose labels are none of this task's; called before its passes begin.

        Raises:
            ModelError: with the column of the labels.
        """

    def arranged(self, module: nn.Module, batch: Batch) -> Batch:
        """The batch as it goes through the module: with the padding that it needs, and masks of it for the layers."""
        return batch

    def positions(self, batch: Batch) -> int | None:
        """How many positions a sequence of the batch has; None when the layers see one row per example or their own."""
        return None

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch, sampler: Sampler | None = None) -> Tensor:
        """The batch's losses, **summed** over its sequences and their tokens: a scalar.

        With a sampler the labels are drawn from the model's own predictive distribution instead of taken from the batch.
        """

    def losses(self, module: nn.Module, batch: Batch) -> Tensor | None:
        """The loss of each sequence, ``[N]``, whose sum is :meth:`loss` with the batch's own labels; None: not told apart."""
        return None

    def row_losses(self, module: nn.Module, batch: Batch) -> Tensor:
        """The loss of each row, ``[N]``, for training with a weight for each example: differentiable more than once."""
        found = self.losses(module, batch)
        if found is not None:
            return found
        return torch.stack([self.loss(module, batch.row(n)) for n in range(len(batch.rows_N))])

    @abstractmethod
    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        """``f`` for each row of the batch, ``[N]``."""

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """What the module predicts wherever there is loss, ``[M, C]``: the loss is a convex function of it.

        Only the exact Gauss-Newton products and the proximal Bregman objective ask for it.
        """
        raise ModelError(f"the task {self.name!r} has no outputs; give it `outputs` and `loss_of` for this solver")

    def loss_of(self, outputs_MC: Tensor, batch: Batch) -> Tensor:
        """The loss of given outputs, summed as :meth:`loss` is: a scalar."""
        raise ModelError(f"the task {self.name!r} has no loss of outputs; give it `outputs` and `loss_of`")

    def root(self, outputs_NC: Tensor, k: int) -> Tensor:
        """Column ``k`` of a root of the Hessian of each example's loss in its outputs, ``[N, C]``.

        The outer products of all ``C`` columns add up to that Hessian, which is the expectation over labels of the outer
        product of the loss's slope; only a fit with ``fisher="exact"`` asks for it.
        """
        raise ModelError(
            f"the expectation over all labels takes a pass for each output of an example: got the task {self.name!r}, which "
            "does not offer them; fit with sampled labels, and with --draws K for less noise"
        )


class LanguageModel(Task):
    """Next-token prediction with a causal language model of ``transformers``.

    Batches are right-padded and no attention mask is given: in a causal model no real token sees the padding after it.
    """

    name = "causal language model"

    def prepare(self, module: nn.Module) -> None:
        decide_ending(module)

    def positions(self, batch: Batch) -> int:
        return batch.inputs["tokens"].shape[1]

    def loss(self, module: nn.Module, batch: Batch, sampler: Sampler | None = None) -> Tensor:
        return self._token_losses(module, batch, sampler).sum()

    def row_losses(self, module: nn.Module, batch: Batch) -> Tensor:
        outputs_MC, (N, T) = self.outputs(module, batch), batch.inputs["tokens"].shape
        losses_M = F.cross_entropy(outputs_MC, _predicted(batch), reduction="none")
        return losses_M.new_zeros(N).index_add(0, batch.predicted().at_M // T, losses_M)

    def log_probs(self, module: nn.Module, batch: Batch) -> Tensor:
        """``log p(z_t | z_<t)`` at every loss token, 0 elsewhere: ``[N, T]``, at the position of the token itself."""
        losses_M, tokens_NT = self._token_losses(module, batch, None), batch.inputs["tokens"]
        return (
            losses_M.new_zeros(tokens_NT.numel()).index_copy(0, batch.predicted().at_M, -losses_M).view(tokens_NT.shape)
        )

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        return -self.log_probs(module, batch).sum(1)

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        if "direction" in batch.inputs:
            return _along(module, batch)
        return self.log_probs(module, batch).sum(1)

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        return wide(_before(whole_logits(module, batch.inputs["tokens"]), batch))

    def loss_of(self, outputs_MC: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs_MC, _predicted(batch), reduction="sum")

    def _token_losses(self, module: nn.Module, batch: Batch, sampler: Sampler | None) -> Tensor:
        """``- log p`` of every loss token of the batch, row by row: ``[M]``."""
        labels_M, u_M = _predicted(batch), None
        if sampler is not None:
            u_NT = sampler.uniform(batch.inputs["tokens"].shape[1])[..., 0]
            u_M = _before(sent(u_NT, labels_M.device)[..., None], batch)[:, 0]

        def labels(p_mV: Tensor, rows: slice) -> Tensor:
            return labels_M[rows] if u_M is None else drawn_exactly(p_mV, u_M[rows])

        end = ending(module)
        if end is None:
            logits_MV = _before(whole_logits(module, batch.inputs["tokens"]), batch)
            drawn_M = labels_M if u_M is None else sample(logits_MV.detach(), u_M)
            return F.cross_entropy(wide(logits_MV), drawn_M, reduction="none")
        return token_losses(_before(end.hidden(module, batch.inputs["tokens"]), batch), end, labels)


def _along(module: nn.Module, batch: Batch) -> Tensor:
    """The mean over a text's tokens of a direction times ``hidden_states[layer]``, as transformers numbers them: ``[N]``."""
    inputs, layer = batch.inputs, int(batch.inputs["layer"][0])
    there = module(input_ids=inputs["tokens"], use_cache=False, output_hidden_states=True).hidden_states
    h_NTH, where_NT = wide(there[layer]), inputs["loss"].clone()
    where_NT[:, 0] = inputs["first"]
    along_NT = torch.einsum("nth,nh->nt", h_NTH, inputs["direction"].to(h_NTH.dtype))
    return (along_NT * where_NT).sum(1) / where_NT.sum(1)


def unit(k: int, like_NC: Tensor) -> Tensor:
    """The unit vector ``[C]`` along output ``k``."""
    return (torch.arange(like_NC.shape[1], device=like_NC.device) == k).to(like_NC)


def _predicted(batch: Batch) -> Tensor:
    """The tokens that are predicted with loss, ``[M]``."""
    return batch.inputs["tokens"].flatten().index_select(0, batch.predicted().at_M)


def _before(x_NTH: Tensor, batch: Batch) -> Tensor:
    """What was made at the positions before them, which predict them, ``[M, H]``."""
    return x_NTH.flatten(0, 1).index_select(0, batch.predicted().at_M - 1)


def sample(logits_MV: Tensor, u_M: Tensor) -> Tensor:
    """One label from each row's softmax, by inverting its cumulative distribution at ``u``: ``[M]``."""
    parts = zip(logits_MV.split(SAMPLE_ROWS), u_M.split(SAMPLE_ROWS), strict=True)
    return torch.cat([drawn_exactly(wide(logits_mV).softmax(-1), u_m) for logits_mV, u_m in parts])


def drawn_exactly(p_MV: Tensor, u_M: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes ``u``, ``[M]``: its block of tokens first, then the token in that.

    Cumulative sums are those of whole numbers: exact, and the same in any order and on any device.
    """
    V = p_MV.shape[1]
    whole = V - V % BLOCK
    blocks_MB = p_MV[:, :whole].unflatten(1, (V // BLOCK, BLOCK)).sum(2)
    block_M1, u_M = _passed(torch.cat([blocks_MB, p_MV[:, whole:].sum(1, keepdim=True)], 1), u_M)
    place_MW = block_M1 * BLOCK + torch.arange(BLOCK, device=p_MV.device)
    p_MW = p_MV.gather(1, place_MW.clamp(max=V - 1)).where(place_MW < V, 0)
    at_M1, _ = _passed(p_MW, u_M)
    return place_MW.gather(1, at_M1)[:, 0].clamp(max=V - 1)


def _passed(p_MK: Tensor, u_M: Tensor) -> tuple[Tensor, Tensor]:
    """The column in which the sum of ``p`` passes its share ``u``, ``[M, 1]``, and how far into it, from 0 to 1: ``[M]``.

    A column of probability zero (or below ``FINE``) is never taken, nor one past the last.
    """
    p_MK = p_MK.double()
    sum_MK = (p_MK / p_MK.sum(1, keepdim=True) / FINE).long().cumsum(1)
    total_M1 = sum_MK[:, -1:]
    target_M1 = u_M.double()[:, None] * total_M1
    at_M1 = torch.searchsorted(sum_MK, torch.minimum(target_M1.long(), total_M1 - 1), right=True)
    at_M1 = at_M1.clamp(max=p_MK.shape[1] - 1)  # of no number: the loss will say so
    end_M1 = sum_MK.gather(1, at_M1)
    start_M1 = sum_MK.gather(1, (at_M1 - 1).clamp(min=0)).where(at_M1 > 0, 0)
    return at_M1, ((target_M1 - start_M1) / (end_M1 - start_M1))[:, 0]


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
