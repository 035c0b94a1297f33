"""Which weight matrices are tracked, and what cannot be.

No table of model names: the blocks of a model are its longest list of alike modules, a layer is attention when a part of
its path or an enclosing class says so, and what is left inside a block is its MLP.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from upriver.errors import LayerError, ModelError
from upriver.model.adapter import Trained, plain_name, trained
from upriver.model.experts import Expert, experts_of
from upriver.model.packed import packed
from upriver.model.parts import Part, given, is_vector, parts_of
from upriver.model.text_part import inside, other_parts

ATTENTION = re.compile(r"attn|attention|^wqkv$", re.IGNORECASE)
MIXER = re.compile(r"mamba|mixer|ssm|recurrent|rglru|conv", re.IGNORECASE)  # of a place in the block
MIXER_CLASS = re.compile(r"(Mixer|Recurrent\w*Block|RgLru|Conv\w*|DeltaNet)$")  # of a module around the layer
MLP_CLASS = re.compile(r"(MLP|Mlp|MoE|Moe|Experts|FeedForward)$")  # which tells, also in a place that is called a mixer
LINEAR = (nn.Linear, Conv1D, nn.Conv2d)  # what gives W a + b at each position
TRANSPOSED = (Conv1D, nn.Embedding)  # what holds its weight as [I, O]
SILENT = "never called"
KINDS = ("mlp", "attention", "all")
ROUTER = re.compile(r"^(gate|router|.*_gate)$|router", re.IGNORECASE)

# What cannot be tracked of a module, as it was found when its layers were last looked for, and why.
LEFT: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


class Layer(NamedTuple):
    """One tracked weight matrix ``W_OI``; with a bias, the bias is its last column (``I`` counts it)."""

    name: str
    modules: tuple[nn.Module, ...]  # more than one when a weight is shared
    O: int
    I: int
    bias: bool
    block: int | None  # depth
    A_of: str  # the layer whose input moment A this one shares (itself when alone)
    parts: int = 1  # diagonal blocks of A and S, at most
    rows: float = 1.0  # inputs that it sees for a token of the corpus: positions of an image, calls, an expert's tokens
    pool: str = ""  # of an expert: the layer under which the experts of a block have one A and one S
    at_NT: torch.Tensor | None = None  # while a pass hands over an expert: each row's position in its sequence, or -1
    named: bool = True  # by a glob: refused where it cannot be tracked, where others of ``mlp`` or ``all`` are left out

    @property
    def kind(self) -> str:
        parts = plain_name(self.name).split(".")
        return ".".join(parts[-2:] if parts[-1] in ("lora_A", "lora_B", "ia3_l") else parts[-1:])

    @property
    def parameters(self) -> int:
        return self.O * self.I

    def told(self) -> dict[str, Any]:
        """What a manifest tells of it."""
        told = {"name": self.name, "shape": [self.O, self.I], "block": self.block, "kind": self.kind, "A_of": self.A_of}
        return told | ({"pool": self.pool} if self.pool else {})


def find_layers(module: nn.Module, spec: str) -> list[Layer]:
    """The layers that ``spec`` names, in the order of the model.

    Args:
        spec: ``mlp`` (both matrices of every block, three of a gated MLP, the experts of a mixture), ``attention``, ``all``
            (both and whatever other linear layers the blocks hold), of a model that sees or hears too those of its text part;
            ``lora`` (what an adapter trained; the others mean its base); globs over module names (an expert's are
            ``experts.3.gate_up_proj``; what names no linear layer may name norms and embeddings); or several of these,
            separated by commas.

    Raises:
        ModelError: one of them matches nothing; the sentence lists what the model has.
    """
    adapter, others = trained(module), other_parts(module)
    linear = {name: m for name, m in linear_modules(module) if name not in adapter.idle}
    found = {
        part: {n for n, m in linear.items() if _matches(module, n, m, part, adapter, others)}
        for part in map(str.strip, spec.split(","))
    }
    every = linear
    if globs := [part for part, names in found.items() if not names and part not in (*KINDS, "lora")]:
        every = {name: m for name, m in linear_modules(module, more=True) if name not in adapter.idle}
        found |= {part: {n for n in every if _named(n, part)} for part in globs}
    nothing = [part for part, names in found.items() if not names]
    if nothing:
        have = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in linear})) or "no linear layer at all"
        experts = sum(p.numel() for n, p in module.named_parameters() if p.ndim >= 3 and "expert" in n)
        share = experts / max(1, sum(p.numel() for p in module.parameters()))
        wide = f"; {share:.0%} of its parameters are expert weights of three axes, which cannot be tracked"
        note, made = wide * bool(experts), len(computed(module))
        if made:
            note += f"; {made} of them compute their weight, as under weight normalisation, and cannot be tracked"
        note += "; there is no adapter that is in use and apart from its base" if nothing[0] == "lora" else ""
        raise ModelError(
            f"no layer to track: --layers {nothing[0]!r} matches nothing; this model has linear layers at {have}{note}; "
            "choose among them with --layers"
        )
    users: dict[int, list[str]] = {}  # the names of the modules that hold each parameter
    for name, m in module.named_modules():
        for p in m.parameters(recurse=False):
            users.setdefault(id(p), []).append(name)
    chosen = [(name, m) for name, m in every.items() if any(name in names for names in found.values())]
    groups = dict.fromkeys(name if isinstance(m, Part) else tuple(users[id(m.weight)]) for name, m in chosen)
    pools: dict[tuple[int, str], Layer] = {}
    by_name = {name for part, names in found.items() if part not in KINDS for name in names}
    layers: list[Layer] = []
    left: dict[str, LayerError] = {}
    for x in groups:
        if isinstance(x, str):
            layers.append(_part(x, every[x], pools)._replace(named=x in by_name))
            continue
        try:
            layers.append(_layer(x[0], [module.get_submodule(n) for n in x])._replace(named=not by_name.isdisjoint(x)))
        except LayerError as error:
            if not by_name.isdisjoint(x):
                raise
            left[x[0]] = error
    LEFT[module] = {}
    return without(module, layers, left)


def without(module: nn.Module, layers: list[Layer], left: dict[str, LayerError]) -> list[Layer]:
    """The layers but for those that cannot be tracked, of which :func:`coverage` tells why.

    Raises:
        LayerError: there are no others.
    """
    LEFT.setdefault(module, {}).update({name: error.why for name, error in left.items()})
    rest, leaders = [x for x in layers if x.name not in left], {}
    if left and not rest:
        raise next(reversed(left.values()))  # those that are never called come first
    return [x._replace(A_of=leaders.setdefault(x.A_of, x.pool or x.name)) for x in rest]


def same_layers(layers: list[Layer], module: nn.Module, copy: nn.Module) -> list[Layer]:
    """The layers of ``module`` in a copy of it."""
    names = {m: name for name, m in module.named_modules()}

    def same(m: nn.Module) -> nn.Module:
        if isinstance(m, Part):
            return held_apart(copy.get_submodule(names[m.owner]))[m.key]
        return copy.get_submodule(names[m])

    return [x._replace(modules=tuple(map(same, x.modules))) for x in layers]


def held_apart(module: nn.Module) -> dict[str, Part]:
    """Weights of a module that are layers of their own, by their names in it."""
    return {**experts_of(module), **parts_of(module)}


def _part(name: str, m: nn.Module, pools: dict[tuple[int, str], Layer]) -> Layer:
    """A part as a layer; experts of a block are alike, and the first of them is looked at for all."""
    assert isinstance(m, Part)
    first = pools.get((id(m.owner), m.part))
    if first is None:
        (O, I), bias, pool = m.weight.shape, m.bias is not None, name if isinstance(m, Expert) else ""
        first = pools[id(m.owner), m.part] = Layer(name, (m,), O, I + bias, bias, block_number(name), name, pool=pool)
    return first._replace(name=name, modules=(m,))


def _layer(name: str, modules: list[nn.Module]) -> Layer:
    """A weight with all the modules that use it: a gradient through only some of them would be a part of its gradient."""
    alike = LINEAR if any(isinstance(m, LINEAR) for m in modules) else type(modules[0])
    other = [type(m).__name__ for m in modules if not isinstance(m, alike)]
    if any(map(several_matrices, modules)):
        raise LayerError(
            f"layer {name!r} cannot be tracked: got a convolution in groups, whose weight is several matrices; leave it "
            "out by giving globs to --layers",
            name,
            "several matrices",
        )
    if other:
        raise LayerError(
            f"layer {name!r} cannot be tracked: its weight is also that of a module that is not linear: got {other[0]}, as of a "
            "tied embedding; leave the layer out with --layers",
            name,
            f"its weight is also that of {other[0]}",
        )
    biases = [getattr(m, "bias", None) for m in modules]
    if any(bias is not biases[0] for bias in biases):
        raise LayerError(
            f"{len(modules)} modules share the weight of layer {name!r} but not its bias, which cannot be tracked as one "
            "matrix; leave them out by giving globs to --layers",
            name,
            "a weight with several biases",
        )
    O, I = weight_shape(modules[0])
    bias = biases[0] is not None and not is_vector(modules[0])
    return Layer(name, tuple(modules), O, I + bias, bias, block_number(name), name)


def block_number(name: str) -> int | None:
    """The first number in the name of a module: its block, counted from below."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


def weight_shape(module: Any) -> tuple[int, int]:
    """``(O, I)`` of a weight, also for GPT-2's transposed ``Conv1D`` and for one that is packed."""
    if isinstance(module, nn.Linear) and packed(module):
        return module.out_features, module.in_features
    if is_vector(module):
        return len(weight_OI(module)), 1
    rows, *columns = module.weight.shape
    return (columns[0], rows) if isinstance(module, TRANSPOSED) else (rows, math.prod(columns))


def weight_OI(module: Any) -> torch.Tensor:
    """The weight as a matrix, the bias as its last column, of a norm below; a convolution's columns go channel by
    channel, each row by row."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    matrix_OI = weight.T if isinstance(module, TRANSPOSED) else weight.reshape(len(weight), -1)
    return matrix_OI if bias is None else torch.cat([matrix_OI, bias.detach()[:, None]], 0 if is_vector(module) else 1)


def rows_seen(module: nn.Module, x: torch.Tensor) -> int:
    """How many inputs an input ``x`` of a layer holds, one for each position."""
    if not isinstance(module, nn.Conv2d):
        return x.numel() // (1 if isinstance(module, nn.Embedding) else x.shape[-1])
    around, sides = module._reversed_padding_repeated_twice, []
    for axis in (0, 1):
        left, right = around[2 * (1 - axis) : 2 * (1 - axis) + 2]
        spread = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        sides.append((x.shape[axis - 2] + left + right - spread) // module.stride[axis] + 1)
    return x.shape[0] * math.prod(sides)


def weight_gradient_as_stored(module: Any, grad_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    """A gradient ``[O, I]`` (bias column last) as the module's own ``weight`` and ``bias``; a part's by the
    names of what holds it, an expert's as its parts of those of all experts."""
    if is_vector(module) and not isinstance(module, Part):
        return dict(zip(("weight", "bias"), grad_OI[:, 0].split(len(module.weight)), strict=False))
    biased = getattr(module, "bias", None) is not None
    weight = grad_OI[:, :-1] if biased else grad_OI
    parts = {"bias": grad_OI[:, -1]} if biased else {}
    if isinstance(module, Part):
        held = [weight.T if module.transposed else weight, *parts.values()]
        return dict(zip(module.stored, held, strict=True))
    if isinstance(module, nn.Conv2d):
        return {"weight": weight.reshape(module.weight.shape), **parts}
    return {"weight": weight.T if isinstance(module, TRANSPOSED) else weight, **parts}


def several_matrices(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1


def linear_modules(module: nn.Module, more: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are linear, and the parts of others; with ``more`` the norms with weights and the embeddings too."""
    for name, m in module.named_modules():
        if more and not isinstance(m, (*LINEAR, Part)) and (is_vector(m) or isinstance(m, nn.Embedding)):
            yield name, m
        if isinstance(m, LINEAR):
            weight = m._parameters.get("weight")  # not there when it is computed, as under weight normalisation
            axes = 4 if isinstance(m, nn.Conv2d) else 2
            if weight is not None and ((weight.is_floating_point() and weight.ndim == axes) or packed(m)):
                yield name, m
        for part, apart in held_apart(m).items():
            yield f"{name}.{part}".removesuffix("."), apart


def computed(module: nn.Module) -> tuple[str, ...]:
    """The names of linear layers whose weight is made of other parameters for each pass, as under weight normalisation."""
    linear = ((n, m) for n, m in module.named_modules() if isinstance(m, LINEAR))
    return tuple(f"{n}." for n, m in linear if m._parameters.get("weight") is None)


def _matches(module: nn.Module, name: str, m: nn.Module, spec: str, adapter: Trained, others: list[str]) -> bool:
    if spec == "lora":
        return name in adapter.layers
    if spec not in KINDS:
        return _named(name, spec)
    outside = several_matrices(m) or name in adapter.own or inside(name, others)
    kind = None if outside else layer_kind(module, name)
    return kind is not None and (spec == "all" or spec == kind)


def _named(name: str, glob: str) -> bool:
    return fnmatch(name, glob) or fnmatch(plain_name(name), glob)


def layer_kind(module: nn.Module, name: str) -> str | None:
    """``mlp``, ``attention`` or ``other`` for a linear layer inside a block; None outside the blocks."""
    parts = name.split(".")
    if parts[-2:-1] != [] and parts[-2].isdigit() and experts_of(module.get_submodule(".".join(parts[:-2]))):
        parts = [*parts[:-2], parts[-1]]  # whose number stands before the part
    around = [module, *(module.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))]
    numbered = [i for i, m in enumerate(around) if parts[i].isdigit() and isinstance(m, nn.ModuleList | nn.Sequential)]
    if not numbered:
        return None
    start = (numbered[0] + 1) % len(parts)  # after the outermost number; a numbered layer is told by its whole name
    inside = plain_name(".".join(parts[start:])).split(".")
    classes = [type(m).__name__ for m in around[start + 1 :]]
    if any(ATTENTION.search(label) for label in inside + classes):
        return "attention"
    if isinstance(getattr(around[-1], parts[-1], None), nn.Conv2d):
        return "other"
    mixes = any(map(MIXER.search, inside)) and not any(map(MLP_CLASS.search, classes))
    return "other" if mixes or any(map(MIXER_CLASS.search, classes)) or ROUTER.search(inside[-1]) else "mlp"


def probe(layers: list[Layer], forward: Callable[[], Any], tokens: int, left: dict[str, LayerError]) -> list[Layer]:
    """Run ``forward`` once, over so many tokens, and note how many inputs each layer sees for one of them, and which layers
    are given the very same input, so that they share one ``A``.

    Args:
        left: where those that are never called are noted.

    Raises:
        LayerError: one that is named, or each of them, is never called, as inside a compiled model, whose hooks do not run.
    """
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    pools = Counter(layer.pool for layer in layers)
    rows = dict.fromkeys(seen, 0)

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen[name].append(given(args, kwargs))
        rows[name] += rows_seen(module, seen[name][-1])

    hooks = [m.register_forward_pre_hook(partial(note, x.name), with_kwargs=True) for x in layers for m in x.modules]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    together: Counter[str] = Counter()  # an expert sees few tokens of one sequence, or none: they are counted together
    for x in layers:
        together[x.pool] += rows[x.name]
    silent = [x for x in layers if not (seen[x.name] or (x.pool and together[x.pool]))]
    for x in silent:
        left[x.name] = LayerError(
            f"{len(silent)} tracked layers were never called, the first is {silent[0].name!r}: the model uses their weights "
            "without them, or is compiled; leave them out by giving globs to --layers, or give the plain model "
            "(model._orig_mod)",
            x.name,
            SILENT,
        )
        if x.named or len(silent) == len(layers):
            raise left[x.name]
    layers = [x for x in layers if x.name not in left]
    leaders: dict[tuple, str] = {}
    keys = [(layer.bias, *map(_patches, layer.modules), *map(id, seen[layer.name])) for layer in layers]
    leads = [x.pool or leaders.setdefault(key, x.name) for x, key in zip(layers, keys, strict=True)]
    counts = [together[x.pool] / pools[x.pool] if x.pool else rows[x.name] for x in layers]
    return [x._replace(A_of=A_of, rows=n / tokens) for x, A_of, n in zip(layers, leads, counts, strict=True)]


def _patches(module: nn.Module) -> tuple:
    """What decides what a layer makes of its input before it multiplies."""
    if is_vector(module) or isinstance(module, nn.Embedding):
        return (id(module),)
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return tuple(getattr(module, name) for name in names) if isinstance(module, nn.Conv2d) else ()
