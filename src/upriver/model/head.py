"""Next-token losses without ever holding all the logits: the end of a language model a chunk of tokens at a time.

The head of most models is one linear layer, and what it gives is what the model returns.  Others cap or scale it afterwards:
their own code is then run on what their body made of some tokens, with the body standing still.  Which of the two a model is
is found out on a few tokens, before its passes begin.  These run the model up to where it ends, and head, softmax, sampling
and their gradient are done for a chunk of loss tokens: memory is a chunk times the vocabulary instead of the batch times the
vocabulary, and positions without loss cost nothing.  A model that is neither is run as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from upriver.errors import ModelError
from upriver.kernels import matmul
from upriver.model.capture import frozen
from upriver.runtime.cost import chunks
from upriver.tensors import on_cpu

PART_BYTES = 2 << 20  # probabilities at once on the CPU: what stays in the caches
PART_ROWS = 256  # elsewhere: a quarter of a chunk
FAR = 60.0  # a loss beyond which the probability loses digits: it is computed again, from the logits
Draw = Callable[[Tensor, slice], Tensor]  # (probabilities of some rows, which ones) -> labels
Back = Callable[[Tensor], Tensor]  # from the gradient of logits to that of the hidden states
TOKENS = object()  # stands for them among what a body was given


class LinearHead:
    """The model ends in ``h W^T + b``, at each position by itself."""

    copies = 1  # a chunk takes as many times fewer tokens, for what is held besides its logits

    def __init__(self, head: nn.Linear):
        self.head = head

    def hidden(self, module: nn.Module, tokens_NT: Tensor) -> Tensor:
        """What the model gives to its end, ``[N, T, H]``."""
        return hidden_states(module, self.head, tokens_NT)

    def logits(self, hidden_MH: Tensor, differentiable: bool) -> tuple[Tensor, Back]:
        """Logits ``[M, V]``, which may be written over, and the way back from their gradient."""
        weight_VH = self.head.weight
        return matmul(hidden_MH, weight_VH.T, self.head.bias), lambda g_MV: matmul(g_MV, weight_VH)


class Call(NamedTuple):
    """What a body was given, ``TOKENS`` among it, and what it gave, or of which class that was."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any


class Tail(LinearHead):
    """The model ends in all that it does after its body, at each position by itself."""

    copies = 2

    def __init__(self, head: nn.Linear, module: nn.Module, body: nn.Module, call: Call):
        super().__init__(head)
        self._module = ref(module)  # whose entry this is in a dictionary of weak keys
        self._body, self._call = body, call

    def hidden(self, module: nn.Module, tokens_NT: Tensor) -> Tensor:
        args = (tokens_NT if x is TOKENS else x for x in self._call.args)
        kwargs = {name: tokens_NT if x is TOKENS else x for name, x in self._call.kwargs.items()}
        return self._body(*args, **kwargs).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden_MH: Tensor, differentiable: bool) -> tuple[Tensor, Back]:
        hidden_MH = hidden_MH.detach().requires_grad_(differentiable)
        with torch.set_grad_enabled(differentiable):
            logits_MV = self.whole(hidden_MH)
        return logits_MV.detach().clone(), lambda g_MV: torch.autograd.grad(logits_MV, hidden_MH, g_MV)[0]

    def whole(self, hidden_MH: Tensor) -> Tensor:
        """Logits with their graph: the model, its body standing still."""
        module = self._module()
        assert module is not None
        given = self._call.output(last_hidden_state=hidden_MH[None])
        tokens_1M = torch.zeros(1, len(hidden_MH), dtype=torch.int64, device=hidden_MH.device)
        with _instead(self._body, lambda *args, **kwargs: given):
            return whole_logits(module, tokens_1M)[0]


# How a module with this head and this body ends; None: neither way.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[nn.Linear, nn.Module | None, LinearHead | None]] = WeakKeyDictionary()


def decide_ending(module: nn.Module) -> None:
    """Find out how a language model ends by running it on a few tokens, once for each head that it is given."""
    head, body = _head(module), _body(module)
    if head is not None and (module not in _KNOWN or _KNOWN[module][:2] != (head, body)):
        with frozen(module), torch.no_grad():
            _KNOWN[module] = head, body, _found(module, head, body)


def ending(module: nn.Module) -> LinearHead | None:
    """How a module ends; None where :func:`decide_ending` found neither way or was not called for this head, and where the
    head's own gradient is wanted: where it is hooked (so tracked), or not frozen."""
    head, known = _head(module), _KNOWN.get(module)
    if head is None or known is None or (torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())):
        return None
    return known[2] if known[:2] == (head, _body(module)) else None


def whole_logits(module: nn.Module, tokens_NT: Tensor) -> Tensor:
    """The model run as it is: ``[N, T, V]``."""
    return module(input_ids=tokens_NT, use_cache=False).logits  # type: ignore[no-any-return]


def _head(module: nn.Module) -> nn.Linear | None:
    """The head that nobody else looks at."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find else None
    plain = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    return head if plain else None


def _body(module: nn.Module) -> nn.Module | None:
    """What comes before the end, unless somebody put another forward on this very module."""
    find = getattr(module, "get_decoder", None)
    body = find() if find else None
    return body if isinstance(body, nn.Module) and body is not module and "forward" not in vars(body) else None


def _found(module: nn.Module, head: nn.Linear, body: nn.Module | None) -> LinearHead | None:
    tokens_NT = torch.arange(8, device=head.weight.device).view(2, 4) % head.out_features
    ends: list[Any] = []
    calls: list[Call] = []

    def note(body: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append(Call(args, kwargs, output))

    hooks = [head.register_forward_hook(lambda m, args, output: ends.append((output, output._version)))]
    if body is not None:
        hooks.append(body.register_forward_hook(note, with_kwargs=True))
    try:
        logits_NTV = whole_logits(module, tokens_NT)
    finally:
        for hook in hooks:
            hook.remove()
    if len(ends) == 1 and ends[0][0] is logits_NTV and ends[0][1] == logits_NTV._version:  # not written over
        return LinearHead(head)
    if body is None or len(calls) != 1:
        return None
    args, kwargs, output = calls[0]
    held = [name for name, x in output.items() if x is not None] if isinstance(output, dict) else []
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if held != ["last_hidden_state"] or len(tensors) != 1 or tensors[0] is not tokens_NT:
        return None  # it was given other tensors than the tokens, or gave other things than hidden states
    args = tuple(TOKENS if x is tokens_NT else x for x in args)
    kwargs = {name: TOKENS if x is tokens_NT else x for name, x in kwargs.items()}
    tail = Tail(head, module, body, Call(args, kwargs, type(output)))
    alike_MV = tail.whole(output["last_hidden_state"].flatten(0, 1))  # all positions in one row
    return tail if torch.allclose(alike_MV, logits_NTV.flatten(0, 1), rtol=1e-3, atol=1e-5) else None


def hidden_states(module: nn.Module, head: nn.Linear, tokens_NT: Tensor) -> Tensor:
    """What the model gives to its head, ``[N, T, H]``: the model with the head passing its input on."""
    with _instead(head, lambda x: x):
        return whole_logits(module, tokens_NT)


@contextmanager
def _instead(module: Any, forward: Callable) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def token_losses(hidden_MH: Tensor, ending: LinearHead, labels: Draw) -> Tensor:
    """``- log p(label)`` of each row, float32 (float64 where the model is) ``[M]``; its gradient is formed in the same pass."""
    return _TokenLosses.apply(hidden_MH, ending, labels)  # type: ignore[no-any-return]


class _TokenLosses(torch.autograd.Function):
    """The gradient of ``- log softmax(z)[label]`` to the logits ``z`` is ``softmax - onehot``, formed while they are there.

    The ending takes a chunk of tokens; what lies between it and its gradient takes a few at a time, which stay in the caches.
    """

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, ending: LinearHead, labels: Draw) -> Tensor:
        wide = torch.float64 if hidden_MH.dtype == torch.float64 else torch.float32
        losses_M = hidden_MH.new_empty(len(hidden_MH), dtype=wide)
        labels_M = torch.empty(len(hidden_MH), dtype=torch.int64, device=hidden_MH.device)
        gradient_MH = torch.empty_like(hidden_MH) if ctx.needs_input_grad[0] else None
        row = 4 * ending.head.out_features
        at_once = chunks(not on_cpu(hidden_MH))
        many = max(1, min(at_once.logit_rows, at_once.logits // row) // ending.copies)
        few = max(1, PART_BYTES // row) if on_cpu(hidden_MH) else PART_ROWS
        for rows in _slices(0, len(hidden_MH), many):
            logits_mV, back = ending.logits(hidden_MH[rows], gradient_MH is not None)
            for some in _slices(rows.start, rows.stop, few):
                logits_pV = logits_mV[some.start - rows.start : some.stop - rows.start]
                p_pV = logits_pV.to(wide).softmax(-1)
                labels_M[some] = labels(p_pV, some)
                label_p1 = labels_M[some, None]
                losses_M[some] = -p_pV.gather(1, label_p1)[:, 0].log()
                if gradient_MH is not None:
                    logits_pV.copy_(p_pV.scatter_add_(1, label_p1, -torch.ones_like(label_p1, dtype=wide)))
            if gradient_MH is not None:
                gradient_MH[rows] = back(logits_mV)
        far_F = (losses_M > FAR).nonzero()[:, 0]
        for some_F in far_F.split(few) if len(far_F) else ():  # an empty tensor has one empty part
            logits_FV, _ = ending.logits(hidden_MH[some_F], False)
            losses_M[some_F] = cross_entropy(logits_FV.to(wide), labels_M[some_F], reduction="none")
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
