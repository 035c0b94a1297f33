"""The one hook of the system: a layer's inputs ``a_NTI`` and output gradients ``g_NTO``, while the backward pass runs.

    with capture(module, layers, consume) as run:
        run(len(batch), real_NT, lambda: task.loss(module, batch))

``consume(layer, a_NTI, g_NTO)`` is called once per layer and backward pass, the last layer first.  Parameters are frozen
meanwhile, so autograd forms no weight gradient, and the backward pass ends at the lowest tracked layer.  The module is left
exactly as it was found.

A layer called several times in one pass gives its calls side by side along T: whatever is summed over tokens is then summed
over calls, before anything is squared.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upriver.errors import LayerError, ModelError, NumericalError
from upriver.kernels import FastKernels
from upriver.model.adapter import multiply_directly
from upriver.model.experts import Expert, packed_rows, run_one_by_one
from upriver.model.layers import Layer
from upriver.model.packed import packed
from upriver.model.parts import as_matrix, kept
from upriver.runtime import dist
from upriver.tensors import on_cpu

APART = "not laid out by sequence and token"
Consume = Callable[[Layer, Tensor, Tensor], None]
Call = tuple[Tensor, Tensor, Tensor | None]  # a_NTI, g_NTO, and of an expert where its rows stand
Calls = dict[int, Call]  # by their number in the forward pass


def _nobody(layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None: ...


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; modes, ``requires_grad`` and attributes as before afterwards.

    What ``torch.compile`` made of the module is set aside meanwhile: a compiled graph would be built again for every set of
    hooks, or run without them.
    """
    dist.reshard(module)
    modes = {m: m.training for m in module.modules()}
    flags = {p: p.requires_grad for p in module.parameters()}
    on_cpu = all(p.device.type == "cpu" for p in flags)
    noted = {m: _attributes(m) for m in modes}
    module.eval()
    for m in filter(packed, modes):
        m.training = True  # for inference on a CPU bitsandbytes rounds their scales once more, and gives no gradient
    module.requires_grad_(False)
    multiply_directly(modes)
    try:
        kernels = FastKernels() if on_cpu else nullcontext()
        with torch.compiler.set_stance("force_eager"), run_one_by_one(module), kernels:
            yield
    finally:
        dist.reshard(module)
        for m, mode in modes.items():
            if m.training != mode:
                m.train(mode)  # some do more than set the attribute; parents come first
            m.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for m, before in noted.items():  # what a forward pass notes would make another module of it
            for name in _attributes(m).keys() - before.keys():
                del vars(m)[name]
            vars(m).update(before)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: x for name, x in vars(module).items() if name[0] != "_" and name != "training"}


@contextmanager
def capture(
    module: nn.Module,
    layers: list[Layer],
    consume: Consume,
    dtype: torch.dtype | None = None,
    left: dict[str, LayerError] | None = None,
) -> Iterator["Run"]:
    """Yield ``run(N, T, forward)``, which runs a forward and a backward pass and feeds ``consume``.

    Args:
        dtype: of what ``consume`` is given; None: as the model computes.
        left: where layers that cannot be tracked are noted instead, unless they were named.

    Raises:
        LayerError: a layer's input cannot be laid out by sequence and token, or the model hides its calls.
        NumericalError: the loss is NaN or infinite.
    """
    run = Run(consume, dtype, left)
    first = {"with_kwargs": True, "prepend": True}  # before the hooks of others: what the weight gave
    hooks = [m.register_forward_hook(partial(run.on_call, x), **first) for x in layers for m in x.modules]
    try:
        with frozen(module):
            yield run
            run.check()
    finally:
        for hook in hooks:
            hook.remove()
        run.let_go()


class Run:
    """The forward and backward passes of one :func:`capture`; call it once per batch."""

    def __init__(self, consume: Consume, dtype: torch.dtype | None = None, left: dict[str, LayerError] | None = None):
        self._consume, self._dtype, self._left = consume, dtype, left
        self._N, self._T = 0, None
        self._backward = False
        self._expected: dict[str, int] = {}
        self._waiting: dict[str, tuple[Layer, Calls]] = {}
        self._losses: Tensor | None = None  # of the batches that were not looked at yet, added up

    def __call__(self, N: int, T: int | None, forward: Callable[[], Tensor]) -> Tensor:
        """Run ``forward`` (a scalar loss of ``N`` sequences of ``T`` positions, None when T is the layer's own) and backward.

        Returns:
            The loss, detached.
        """
        self._N, self._T, self._backward = N, T, False
        self._expected, self._waiting = {}, {}
        with torch.enable_grad():
            loss = forward()
        if not loss.requires_grad:
            none = ModelError("the loss does not depend on any tracked layer; choose other layers with --layers")
            raise next(iter((self._left or {}).values()), none)
        self._losses = loss.detach() if self._losses is None else self._losses + loss.detach()
        if on_cpu(loss):
            self.check()
        self._backward = True
        loss.backward()
        for layer, calls in self._waiting.values():
            self._hand_over(layer, calls)
        return loss.detach()

    def _trackable(self, layer: Layer, made: Callable[[], Any]) -> Any:
        """What is made of a layer's call; None once it cannot be tracked."""
        if self._left is None or layer.named:
            return made()
        try:
            return None if layer.name in self._left else made()
        except LayerError as error:
            self._waiting.pop(layer.name, None)
            self._left[layer.name] = error
        return None

    def check(self) -> None:
        """Refuse a loss that is no number, which no sum hides: at once, or on another device at the end of :func:`capture`.

        To look at each there would be to wait for it; nothing is made of what was captured before that end.
        """
        losses, self._losses = self._losses, None
        if losses is not None and not math.isfinite(value := float(losses)):
            raise NumericalError(f"the loss of a batch is {value}; check the weights for NaN, or use --dtype float32")

    def let_go(self) -> None:
        """Forget who consumes and what waits: hooks and passes know each other, and would keep it until cycles are collected."""
        self._consume, self._waiting = _nobody, {}

    def on_call(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The forward hook: keep the input, and ask for the gradient at the output."""
        return self._trackable(layer, lambda: self._call(layer, module, args, kwargs, output))

    def _call(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not torch.is_grad_enabled():
            raise LayerError(
                f"layer {layer.name!r} runs without gradients inside the model, as under reentrant activation checkpointing; "
                "switch checkpointing off or give it use_reentrant=False",
                layer.name,
                "runs without gradients",
            )
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise LayerError(
                f"layer {layer.name!r} cannot be tracked: it does not give W a + b of its own weight and bias: got "
                f"{type(module).__name__}, which gives a {kind}; leave it out by giving globs to --layers",
                layer.name,
                f"gives a {kind}",
            )
        if not output.requires_grad:  # the lowest tracked layer: the graph begins here
            output = output.requires_grad_().clone()
        elif output._is_view():  # written over in place, a view would leave the graph, and its hook with it
            output = torch.ops.aten._unsafe_view(output, output.shape)
        if not self._backward:  # a recomputation under activation checkpointing only rebuilds the graph
            number = self._expected.get(layer.name, 0)
            self._expected[layer.name] = number + 1
            a = kept(module, args, kwargs)
            where = (kwargs["at_M"], kwargs["tokens"]) if isinstance(module, Expert) else None
            keep = partial(self._gradient, layer, module, number, a.detach(), a._version, where)
            output.register_hook(lambda g: self._trackable(layer, lambda: keep(g)))
        return output

    def _gradient(
        self, layer: Layer, module: nn.Module, number: int, a: Tensor, version: int, where: Any, g: Tensor
    ) -> None:
        if a._version != version:  # autograd would say so itself if the weight were not frozen
            raise LayerError(
                f"the input of layer {layer.name!r} is written over by a later in-place operation of the model; "
                "leave the layer out with --layers",
                layer.name,
                "its input is written over",
            )
        calls = self._waiting.setdefault(layer.name, (layer, {}))[1]
        if where is None:
            a, g = as_matrix(module, a, g, self._T)
            calls[number] = self._lay_out(layer, a, layer.bias), self._lay_out(layer, g, False), None
        else:
            calls[number] = self._laid_out(layer, a, g, *where)
        if len(calls) == self._expected[layer.name]:
            self._hand_over(*self._waiting.pop(layer.name))

    def _hand_over(self, layer: Layer, waiting: Calls) -> None:
        calls = [waiting[number] for number in sorted(waiting)]
        a_NTI, g_NTO, at_NT = calls[0]
        if len(calls) > 1:
            a_NTI, g_NTO = torch.cat([a for a, _, _ in calls], 1), torch.cat([g for _, g, _ in calls], 1)
            at_NT = None if at_NT is None else torch.cat([at for *_, at in calls if at is not None], 1)
        layer = layer if at_NT is None else layer._replace(at_NT=at_NT)
        with torch.no_grad():
            self._consume(layer, a_NTI, g_NTO)

    def _laid_out(self, layer: Layer, a_MI: Tensor, g_MO: Tensor, at_M: Tensor, tokens: int) -> Call:
        """The rows of an expert by sequence, with ones for the bias where there is a row."""
        T, rest = divmod(tokens, self._N)
        if rest or (self._T is not None and T % self._T):
            raise LayerError(
                f"layer {layer.name!r} cannot be laid out by sequence and token: the experts see {tokens} tokens in a batch of "
                f"{self._N} sequences; leave it out with --layers",
                layer.name,
                APART,
            )
        if layer.bias:
            a_MI = torch.cat([a_MI, a_MI.new_ones(len(a_MI), 1)], 1)
        (a_NtI, at_Nt), (g_NtO, _) = (packed_rows(x, at_M, self._N, T) for x in (a_MI, g_MO))
        return a_NtI.to(self._dtype or a_NtI.dtype), g_NtO.to(self._dtype or g_NtO.dtype), at_Nt

    def _lay_out(self, layer: Layer, x: Tensor, bias: bool) -> Tensor:
        """``x`` as ``[N, T, width]``, with a column of ones for the bias."""
        N, T = self._N, self._T
        flat = x.ndim == 2 and T is not None and x.shape[0] == N * T
        if not flat and (x.shape[0] != N or (T is not None and x.shape[1:-1].numel() != T)):
            raise LayerError(
                f"layer {layer.name!r} cannot be laid out by sequence and token: it sees a tensor of shape {tuple(x.shape)} "
                f"in a batch of {N} sequences of {T} tokens; leave it out with --layers",
                layer.name,
                APART,
            )
        x_NTI = x.reshape(N, -1, x.shape[-1])
        if not bias:
            return x_NTI.to(self._dtype or x_NTI.dtype)
        out_NTI = x_NTI.new_empty(*x_NTI.shape[:2], x_NTI.shape[2] + 1, dtype=self._dtype)
        out_NTI[..., :-1] = x_NTI
        out_NTI[..., -1] = 1
        return out_NTI
