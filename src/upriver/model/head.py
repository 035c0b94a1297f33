"""Next-token losses without ever holding all the logits: the language-model head a chunk of tokens at a time.

The head of most models is one linear layer, and what it gives is what the model returns.  Where that is so (the first pass
of a model is run whole, and the two tensors are compared for identity), later passes run the model up to the head's input, and
head, softmax, sampling and their gradient are done for a chunk of loss tokens: memory is a chunk times the vocabulary instead of
the batch times the vocabulary, and positions without loss cost nothing.  Other models (soft caps, scales) are run as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upriver.errors import ModelError
from upriver.runtime.split import HEAD_BYTES, HEAD_ROWS
from upriver.tensors import matmul, on_cpu

PART_BYTES = 2 << 20  # probabilities at once on the CPU: what stays in the caches
PART_ROWS = 256  # elsewhere: a quarter of a chunk
FAR = 60.0  # a loss beyond which the probability loses digits: it is computed again, from the logits
Labels = Callable[[Tensor, slice], Tensor]  # (probabilities of some rows, which ones) -> labels


class Heads:
    """Which modules end in a plain linear head, found out in the first pass of each."""

    def __init__(self) -> None:
        self._plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def plain_head(self, module: nn.Module) -> nn.Linear | None:
        """The head, once a pass has shown that it comes last; None before that, and where its own gradient is wanted: where
        it is hooked (so tracked), or not frozen."""
        head = _head(module)
        free = head is not None and not head._forward_hooks and not head._forward_pre_hooks
        if head is not None and torch.is_grad_enabled():
            free = free and not any(p.requires_grad for p in head.parameters())
        return head if free and self._plain.get(module) else None

    def logits(self, module: nn.Module, tokens_NT: Tensor) -> Tensor:
        """The model run whole, ``[N, T, V]``, and looked at on the way."""
        head, seen = _head(module), []
        hook = head.register_forward_hook(lambda m, args, output: seen.append(output)) if head is not None else None
        try:
            logits_NTV = module(input_ids=tokens_NT, use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        self._plain[module] = len(seen) == 1 and seen[0] is logits_NTV
        return logits_NTV


def _head(module: nn.Module) -> nn.Linear | None:
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find else None
    return head if type(head) is nn.Linear else None


def hidden_states(module: nn.Module, head: nn.Linear, tokens_NT: Tensor) -> Tensor:
    """What the model gives to its head, ``[N, T, H]``: the model with the head passing its input on."""
    with _passing(head):
        return module(input_ids=tokens_NT, use_cache=False).logits


@contextmanager
def _passing(head: Any) -> Iterator[None]:
    head.forward = lambda x: x
    try:
        yield
    finally:
        del head.forward


def token_losses(hidden_MH: Tensor, head: nn.Linear, labels: Labels) -> Tensor:
    """``- log p(label)`` of each row, float32 (float64 where the model is) ``[M]``; its gradient is formed in the same pass."""
    return _TokenLosses.apply(hidden_MH, head, labels)  # type: ignore[no-any-return]


class _TokenLosses(torch.autograd.Function):
    """The gradient of ``- log softmax(h W^T)[label]`` to ``h`` is ``(softmax - onehot) W``, formed while the logits are there.

    Products take a chunk of tokens; what lies between them takes a few at a time, so that it stays in the caches.
    """

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, head: nn.Linear, labels: Labels) -> Tensor:
        wide = torch.float64 if hidden_MH.dtype == torch.float64 else torch.float32
        losses_M = hidden_MH.new_empty(len(hidden_MH), dtype=wide)
        labels_M = torch.empty(len(hidden_MH), dtype=torch.int64, device=hidden_MH.device)
        gradient_MH = torch.empty_like(hidden_MH) if ctx.needs_input_grad[0] else None
        row = 4 * head.out_features
        many = max(1, min(HEAD_ROWS, HEAD_BYTES // row))
        few = max(1, PART_BYTES // row) if on_cpu(hidden_MH) else PART_ROWS
        for rows in _slices(0, len(hidden_MH), many):
            logits_mV = matmul(hidden_MH[rows], head.weight.T, head.bias)
            for some in _slices(rows.start, rows.stop, few):
                logits_pV = logits_mV[some.start - rows.start : some.stop - rows.start]
                p_pV = logits_pV.to(wide).softmax(-1)
                labels_M[some] = labels(p_pV, some)
                label_p1 = labels_M[some, None]
                losses_M[some] = -p_pV.gather(1, label_p1)[:, 0].log()
                if gradient_MH is not None:
                    logits_pV.copy_(p_pV.scatter_add_(1, label_p1, -torch.ones_like(label_p1, dtype=wide)))
            if gradient_MH is not None:
                gradient_MH[rows] = matmul(logits_mV, head.weight)
        far_F = (losses_M > FAR).nonzero()[:, 0]
        for some_F in far_F.split(many):
            logits_FV = matmul(hidden_MH[some_F], head.weight.T, head.bias)
            losses_M[some_F] = F.cross_entropy(logits_FV.to(wide), labels_M[some_F], reduction="none")
        if gradient_MH is not None:
            ctx.save_for_backward(gradient_MH)
        return losses_M

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph: the saved gradient would pass for a constant
            raise ModelError(
                "the loss has no second derivative with a frozen head; use the task's `outputs` and `loss_of`"
            )
        (gradient_MH,) = ctx.saved_tensors
        return gradient_MH * outer[0].to(gradient_MH.dtype)[:, None], None, None


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))
