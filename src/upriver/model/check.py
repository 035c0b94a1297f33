"""One check of the tracked layers: on one short batch, what is captured is the gradient that autograd gives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from upriver.errors import ModelError
from upriver.model.capture import capture
from upriver.model.layers import Layer, probe, weight_gradient_as_stored
from upriver.runtime import dist

# Of the largest gradient that such inputs could give; products of float32 numbers may be in TF32.
TOLERANCE, TF32, NARROW = {torch.float64: 1e-7, torch.float32: 1e-4}, 2e-3, 2e-2


def checked_layers(
    module: nn.Module, layers: list[Layer], N: int, T: int | None, forward: Callable[[], Tensor]
) -> list[Layer]:
    """Refuse layers that cannot be tracked, and mark those that are given the same inputs.

    ``forward`` is run forward and backward once, with the weights of the layers unfrozen.  As soon as autograd has the gradient
    of one of them it is compared with what was captured, and both are let go.

    Args:
        N, T: sequences and positions of the loss that ``forward`` gives, as for :func:`capture`.

    Raises:
        ModelError: a layer is never called, as inside a compiled model, whose hooks do not run; it computes another thing than
            ``W a + b``; or its weight or bias is used outside of it too, so that its calls show a part of the gradient.
    """
    comparison, hooks = _Comparison(layers), []
    before = {p: p.grad for p in comparison.owners}
    found: list[Layer] = []
    losses: list[Tensor] = []

    def probed() -> Tensor:
        found.extend(probe(layers, lambda: losses.append(forward())))
        return losses[0]

    try:
        with capture(module, layers, comparison) as run:
            for p in before:
                p.grad = None
                hooks.append(p.requires_grad_().register_post_accumulate_grad_hook(comparison.when_captured))
            run(N, T, probed)
            for p in comparison.owners.copy():
                comparison.compare(p)
    finally:
        for hook in hooks:
            hook.remove()
        for p, grad in before.items():
            p.grad = grad
    return found


class _Comparison:
    """Consumer: holds what was captured of a layer until autograd's gradients of its weight and bias are there."""

    def __init__(self, layers: list[Layer]):
        held = [(p, (x, n)) for x in layers for m in x.modules for n, p in m.named_parameters(recurse=False)]
        self.owners = {p: owner for p, owner in held if owner[1] in ("weight", "bias") and not dist.sharded(p)}
        self.captured: dict[
            str, tuple[dict[str, Tensor], float]
        ] = {}  # parts as stored, and how far rounded sums may be off

    def __call__(self, x: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        kinds = (a_NTI.dtype, g_NTO.dtype, x.modules[0].get_parameter("weight").dtype)
        wide = torch.float64 if torch.float64 in kinds else torch.float32
        a_MI, g_MO = a_NTI.flatten(0, 1).to(wide), g_NTO.flatten(0, 1).to(wide)
        rounded = TF32 if wide == torch.float32 and torch.get_float32_matmul_precision() != "highest" else 0.0
        tolerance = max(rounded, *(TOLERANCE.get(kind, NARROW) for kind in kinds))
        allowed = tolerance * float(a_MI.norm(dim=0).max() * g_MO.norm(dim=0).max())
        self.captured[x.name] = weight_gradient_as_stored(x.modules[0], g_MO.T @ a_MI), allowed

    def when_captured(self, p: Any) -> None:
        if self.owners[p][0].name in self.captured:
            self.compare(p)

    @torch.no_grad()
    def compare(self, p: Any) -> None:
        x, name = self.owners.pop(p)
        parts, allowed = self.captured.get(x.name, ({}, 0.0))
        mine, theirs = parts.pop(name, p.new_zeros(())), p.new_zeros(()) if p.grad is None else p.grad
        p.grad = None
        if float((mine - theirs).abs().max()) > allowed:
            raise ModelError(
                f"layer {x.name!r} cannot be tracked: its calls do not show the gradient of its {name}: got "
                f"{type(x.modules[0]).__name__}, which gives another thing than W a + b, or whose weight or bias is used outside "
                "of it too; leave it out by giving globs to --layers"
            )
