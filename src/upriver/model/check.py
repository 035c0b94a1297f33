"""What must hold before a pass: lengths that the model takes, a loss that is a sum, layers whose gradient is what is captured."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upriver.errors import LayerError, ModelError
from upriver.model.capture import capture, frozen
from upriver.model.layers import LEFT, SILENT, Layer, find_layers, probe, weight_gradient_as_stored, without
from upriver.model.losses import LanguageModel
from upriver.model.model import Model, check_causal
from upriver.model.packed import packed
from upriver.model.parts import Part
from upriver.model.sweep import Labels
from upriver.runtime import dist
from upriver.text.batch import Sequences

# Of the largest gradient that such inputs could give; products of float32 numbers may be in TF32.
TOLERANCE, TF32, NARROW = {torch.float64: 1e-7, torch.float32: 1e-4}, 2e-3, 2e-2


def checked_layers(
    module: nn.Module, layers: list[Layer], N: int, T: int | None, forward: Callable[[], Tensor]
) -> list[Layer]:
    """Refuse layers that were named and cannot be tracked, leave others such out, and mark those that are given the same inputs.

    ``forward`` is run forward and backward once, with the weights of the layers unfrozen.  As soon as autograd has the gradient
    of one of them it is compared with what was captured, and both are let go.  Autograd has none of a packed weight: its layer is
    run once more instead (:func:`_check_packed`).

    Args:
        N, T: sequences and positions of the loss that ``forward`` gives, as for :func:`capture`.

    Raises:
        LayerError: a layer that was named, or each of them, is never called, as inside a compiled model, whose hooks do not run;
            it computes another thing than ``W a + b``; or its weight or bias is used outside of it too, so that its calls show
            a part of the gradient.
    """
    left: dict[str, LayerError] = {}
    comparison, hooks = _Comparison(layers, left), []
    before = {p: p.grad for p in comparison.owners}
    found: list[Layer] = []
    losses: list[Tensor] = []

    def probed() -> Tensor:
        found.extend(probe(layers, lambda: losses.append(forward()), N * (T or 1), left))
        return losses[0]

    try:
        with capture(module, layers, comparison, left=left) as run:
            for p in before:
                p.grad = None
                hooks.append(p.requires_grad_().register_post_accumulate_grad_hook(comparison.when_captured))
            run(N, T, probed)
            for p in comparison.owners.copy():
                comparison.compare(p)
            for x, a_MI, g_MO in comparison.packed:
                comparison.noted(x, lambda x=x, a_MI=a_MI, g_MO=g_MO: _check_packed(x, a_MI, g_MO))
    finally:
        for hook in hooks:
            hook.remove()
        for p, grad in before.items():
            p.grad = grad
    pools = {x.pool: left[x.name] for x in found if x.pool and x.name in left}
    rest = without(module, found, left | {x.name: pools[x.pool] for x in found if x.pool in pools})
    return [x._replace(named=True) for x in rest]  # from now on it is refused


class _Comparison:
    """Consumer: holds what was captured of a layer until autograd's gradients of its weight and bias are there."""

    def __init__(self, layers: list[Layer], left: dict[str, LayerError]):
        self.left = left
        named = [(x, m, n, p) for x in layers for m in x.modules for n, p in m.named_parameters(recurse=False)]
        experts = [(p, (x, n)) for x in layers for m in x.modules if isinstance(m, Part) for n, p in m.stored.items()]
        held = [(p, (x, n)) for x, m, n, p in named if n == "bias" or (n == "weight" and not packed(m))]
        self.owners = {p: owner for p, owner in held + experts if not dist.sharded(p)}
        self.experts: dict[Any, list[tuple[Layer, str]]] = {}  # those that a parameter holds, where it holds several
        for p, owner in experts:
            self.experts.setdefault(p, []).append(owner)
        self.packed: list[tuple[Layer, Tensor, Tensor]] = []  # what some tokens gave to such a layer, and got back
        # parts as stored, and how far rounded sums may be off
        self.captured: dict[str, tuple[dict[str, Tensor], float]] = {}

    def __call__(self, x: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        module: Any = x.modules[0]
        kinds = (a_NTI.dtype, g_NTO.dtype, module.weight.dtype)
        wide = torch.float64 if torch.float64 in kinds else torch.float32
        a_MI, g_MO = a_NTI.flatten(0, 1).to(wide), g_NTO.flatten(0, 1).to(wide)
        rounded = TF32 if wide == torch.float32 and torch.get_float32_matmul_precision() != "highest" else 0.0
        tolerance = max(rounded, *(TOLERANCE.get(kind, NARROW) for kind in kinds))
        allowed = tolerance * float(a_MI.norm(dim=0).max() * g_MO.norm(dim=0).max())
        self.captured[x.name] = weight_gradient_as_stored(x.modules[0], g_MO.T @ a_MI), allowed
        if packed(x.modules[0]):
            g_MO = g_NTO.flatten(0, 1)
            most_m = g_MO.norm(dim=1).topk(min(CHECKED, len(g_MO))).indices
            self.packed.append((x, a_NTI.flatten(0, 1)[most_m, : x.I - x.bias], g_MO[most_m]))

    def when_captured(self, p: Any) -> None:
        if p not in self.experts and self.owners[p][0].name in self.captured:
            self.compare(p)

    def noted(self, x: Layer, check: Callable[[], None]) -> None:
        """Check a layer; note what is wrong with it, unless it was named."""
        try:
            if x.name not in self.left:
                check()
        except LayerError as error:
            if x.named:
                raise
            self.left[x.name] = error

    def compare(self, p: Any) -> None:
        x, name = self.owners.pop(p)
        self.noted(x, lambda: self._compare(p, x, name))
        p.grad = None

    @torch.no_grad()
    def _compare(self, p: Any, x: Layer, name: str) -> None:
        parts, allowed = self.captured.get(x.name, ({}, 0.0))
        theirs = p.new_zeros(()) if p.grad is None else p.grad
        if p in self.experts:
            mine, allowed, chosen = torch.zeros_like(p), 0.0, torch.zeros_like(p, dtype=torch.bool)
            for x, name in self.experts[p]:
                parts, most = self.captured.get(x.name, ({}, 0.0))
                expert: Any = x.modules[0]
                mine[expert.index] = parts.pop(name, p.new_zeros(()))
                chosen[expert.index] = True
                allowed = max(allowed, most)
            mine, theirs = mine[chosen], theirs[chosen] if theirs.ndim else theirs
        else:
            mine = parts.pop(name, p.new_zeros(()))
            if not x.named and name == "weight" and not bool(theirs.any()):
                raise LayerError(
                    f"layer {x.name!r} got no gradient on a sequence that was looked at; leave it out with --layers",
                    x.name,
                    NO_GRADIENT,
                )
        if float((mine - theirs).abs().max()) > allowed:
            raise LayerError(
                f"layer {x.name!r} cannot be tracked: its calls do not show the gradient of its {name}: got "
                f"{type(x.modules[0]).__name__}, which gives another thing than W a + b, or whose weight or bias is used outside "
                "of it too; leave it out by giving globs to --layers",
                x.name,
                f"its calls do not show the gradient of its {name}",
            )


def _check_packed(x: Layer, a_MI: Tensor, g_MO: Tensor) -> None:
    """Refuse a layer of packed weights that is no ``W a + b`` with the same ``W`` on the way there and on the way back.

    ``g.(out(a) - b) = a.(W^T g)``, token by token, with ``W^T g`` from the backward pass at ``-a``: what is not linear has
    another slope there.  The output may be rounded, as the inputs in 8 bits are.
    """
    for m in x.modules:
        with torch.enable_grad():
            there_MI, other_MI = (a.detach().requires_grad_() for a in (a_MI, -a_MI))
            out_MO, slope_MO = m.forward(there_MI), m.forward(other_MI)
            back_MI = (
                torch.autograd.grad(slope_MO, other_MI, g_MO)[0] if slope_MO.requires_grad else torch.zeros_like(a_MI)
            )
        bias = m.get_parameter("bias").detach() if x.bias else 0.0
        made_MO, (a, g, back) = (out_MO.detach() - bias).double(), (y.double() for y in (a_MI, g_MO, back_MI))
        size_M = made_MO.norm(dim=1) * g.norm(dim=1) + a.norm(dim=1) * back.norm(dim=1)
        if bool((((made_MO * g).sum(1) - (a * back).sum(1)).abs() > NARROW * size_M).any()):
            raise LayerError(
                f"layer {x.name!r} cannot be tracked: got {type(m).__name__} of packed weights, whose output and whose gradient "
                "at the input are not those of one matrix; leave it out by giving globs to --layers",
                x.name,
                "not one matrix",
            )


NO_GRADIENT = "the loss does not depend on it"
UNSEEN = (SILENT, NO_GRADIENT)  # what another sequence may show otherwise
CHECKED = 8  # tokens of the sequence on which layers are checked, at least
LOOKED_AT = 64  # short sequences, for two that have loss
APART, TINY = 0.1, 1e-6  # of the size of a loss; a size of which nothing can be said
NARROW_APART, NARROW_TINY = 0.4, 1e-4  # in bfloat16, where another label may be drawn; a mean is off by a half
RULE = "give a sum over sequences and tokens, never a mean"


def tracked_layers(
    model: Model, data: Sequences, spec: str, parts: int = 1, same: Collection[str] | None = None
) -> list[Layer]:
    """The layers that ``spec`` names, checked on one short sequence, with those that share an input marked.

    What cannot be tracked is left out, and :func:`~upriver.model.coverage.coverage` tells why, unless a glob names it.  What the
    sequence does not go through is looked for in a shorter and in longer ones.

    Args:
        parts: diagonal blocks of their second moments, at most.
        same: the names of those that were tracked before, which are tracked again or refused.

    Raises:
        LayerError: one that was named, or tracked before, cannot be tracked.
    """
    found = [x._replace(parts=parts) for x in find_layers(model.module, spec) if not same or x.name in same]
    tracked: dict[str, Layer] = {}
    left, wanted = LEFT[model.module], found
    failed: ModelError | None = None
    model.task.prepare(model.module)
    for row in _looked_at(data):
        batch = data.batch(np.array([row])).to(model.device)
        T = model.task.positions(batch)
        try:
            some = checked_layers(model.module, wanted, 1, T, lambda b=batch: model.task.loss(model.module, b))
            tracked |= {x.name: x for x in some}
        except ModelError as error:
            failed = failed or error
        wanted = [x for x in wanted if x.name not in tracked and left.get(x.name) in UNSEEN]
        if not wanted:
            break
    for name in tracked:
        left.pop(name, None)
    lacking = set(same or ()) - tracked.keys()
    if failed and (lacking or not tracked):
        raise failed
    if lacking:
        name = min(lacking)
        raise LayerError(f"layer {name!r} was tracked before, and cannot be now: {left.get(name)}", name, "")
    return [tracked[x.name] for x in found if x.name in tracked]


def _looked_at(data: Sequences) -> list[int]:
    """A sequence with loss, where some short one has any: the shortest of ``CHECKED`` tokens or more; then the shortest, the
    longest of the short ones, and the longest of all."""
    rows = _with_loss(data)
    enough = rows[data.lengths_N[rows] >= CHECKED]
    ends = [*enough[:1], *rows[:1], *rows[-1:]] if len(enough) else [*rows[-1:], *rows[:1]]
    return list(dict.fromkeys(map(int, [*(ends or [np.argmin(data.lengths_N)]), np.argmax(data.lengths_N)])))


def check_data(model: Model, data: Sequences) -> None:
    """Refuse labels that are none of the task's, sequences that the model does not take, and those that change what it makes of
    others in their batch.

    Raises:
        ModelError: with the length that is allowed.
    """
    named = getattr(data, "inputs", {"tokens"})
    if isinstance(model.task, LanguageModel) and "tokens" not in named:
        raise ModelError(
            f"the model has no task for such examples: got {', '.join(named)} and a language model; give "
            "up.Model(module, task=up.Classification()) or another task"
        )
    model.task.check(model.module, data)
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
    if (highest := getattr(data, "max_token", None)) is not None:
        check_token(model, highest, "the corpus")


def check_moments(layers: list[Layer]) -> None:
    """Refuse an embedding where second moments are taken: those of its inputs would be a matrix of words by words.

    Raises:
        ModelError: with its name.
    """
    for x in layers:
        if isinstance(x.modules[0], nn.Embedding):
            raise ModelError(
                f"the embedding {x.name!r} cannot be fitted: its second moments would have {x.I:,} x {x.I:,} numbers; leave "
                "it out of --layers, or trace it without factors, with --curvature identity, cg, lissa, arnoldi or nystrom"
            )


def check_token(model: Model, highest: int, what: str) -> None:
    """Refuse tokens that a language model has no row for, as a special token that was added and never trained.

    Raises:
        ModelError: with the token.
    """
    found: Any = getattr(model.module, "get_input_embeddings", None)
    embedding = found() if found else None
    rows = len(embedding.weight) if isinstance(embedding, nn.Embedding) else None
    if rows is not None and highest >= rows:
        raise ModelError(
            f"{what} holds a token that the model has no embedding for: got "
            f"{model.tokenizer.convert_ids_to_tokens(highest)!r}, number {highest:,}, and the model embeds {rows:,}; "
            "take it out of the text, or use the model that was trained with it"
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


def count_outputs(model: Model, data: Sequences) -> int:
    """How many outputs an example has, where the expectation over its labels can be taken output by output.

    Raises:
        ModelError: the task does not offer them, or a sequence has several predictions.
    """
    batch = data.batch(np.array(_looked_at(data)[:1])).to(model.device)
    with frozen(model.module), torch.no_grad():
        outputs_MC = model.task.outputs(model.module, batch)
        model.task.root(outputs_MC, 0)
    if len(outputs_MC) != len(batch.rows_N):
        raise ModelError(
            f"the expectation over all labels is for tasks of one prediction an example: got {len(outputs_MC)} of a sequence; "
            "fit with sampled labels, and with --draws K for less noise"
        )
    return outputs_MC.shape[1]


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


def tells_losses(model: Model, data: Sequences) -> bool:
    """Whether the task tells the loss of each sequence; one that overrides ``loss`` alone inherits others, which add up to less
    or more."""
    batch = data.batch(_with_loss(data)[:2]).to(model.device)
    with frozen(model.module), torch.no_grad():
        each_N = model.task.losses(model.module, batch)
        if each_N is None or each_N.shape != batch.rows_N.shape:
            return False
        together = float(model.task.loss(model.module, batch))
    apart = NARROW if model.dtype.itemsize == 2 else TOLERANCE[torch.float32]
    return abs(float(each_N.double().sum()) - together) <= apart * float(each_N.double().abs().sum())
