"""What share of a model its tracked layers are, and what is left out, for which reason."""

import re
from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from upriver.model.adapter import plain_name, trained
from upriver.model.layers import LEFT, Layer, computed, held_apart, linear_modules, several_matrices
from upriver.model.packed import held_in, parameter_sizes
from upriver.model.parts import Part
from upriver.model.text_part import inside, other_parts


class Coverage(NamedTuple):
    """The share of the model's parameters that influence is computed for, and what is left out."""

    tracked: int
    total: int
    untracked: list[dict[str, Any]]  # name, parameters, share, why
    packed: str = ""  # what is said of tracked weights that are held in fewer bits
    trained: int = 0  # parameters that an adapter trained; 0 without one
    trained_tracked: int = 0  # of these

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Coverage":
        """What a manifest tells of it."""
        return cls(**{name: stored[name] for name in cls._fields if name in stored})

    @property
    def share(self) -> float:
        return self.tracked / self.total

    def line(self) -> str:
        left = [u for u in self.untracked if u.get("trained") or not self.trained_tracked]
        whole = self.trained if self.trained_tracked else self.total
        rest = ", ".join(f"{u['name']} {u['parameters'] / whole:.1%} ({u['why']})" for u in left[:6])
        line = f"tracked {self.tracked:,} of {self.total:,} parameters ({self.share:.1%})"
        if self.trained:
            share = self.trained_tracked / self.trained
            line += f", {self.trained_tracked:,} of the {self.trained:,} that the adapter trained ({share:.1%})"
        line += f"; not{' of these' * bool(self.trained_tracked)}: {rest or 'nothing'}"
        return f"{line}; {self.packed}" if self.packed else line


def coverage(module: nn.Module, layers: list[Layer]) -> Coverage:
    """What share of the parameters ``layers`` hold; the rest grouped by place, with the reason it is left out."""
    tracked = {id(p) for layer in layers for m in layer.modules for p in m.parameters(recurse=False)}
    slices: Counter[Any] = Counter()  # numbers of a parameter that some experts hold of it
    for m in (m for x in layers for m in x.modules if isinstance(m, Part)):
        slices.update({p: p[m.index].numel() for p in m.stored.values()})
    linear = {
        f"{name}.{p}" for name, m in linear_modules(module) if not several_matrices(m) for p in ("weight", "bias")
    }
    linear |= {f"{name}.{p}" for name, m in module.named_modules() for x in held_apart(m).values() for p in x.stored}
    sizes, left_out, others = parameter_sizes(module), dict(LEFT.get(module, {})), other_parts(module)
    left_out |= {re.sub(r"\.\d+(\.[^.]+)$", r"\1", name): why for name, why in left_out.items()}  # an expert's, of all
    total, adapter = sum(sizes.values()), trained(module).parameters
    groups: dict[tuple[str, str, bool], int] = {}
    made = computed(module)
    for name, p in module.named_parameters():
        left = sizes[p] - slices[p]  # of experts some may be chosen
        if id(p) not in tracked and left:
            place, owner = re.sub(r"\.\d+\.", ".*.", f".{name}").lstrip("."), name.rpartition(".")[0]
            why = left_out.get(owner) or left_out.get(name.removesuffix("_bias")) or _why(name, p, name in linear)
            why = "a weight that is computed" if name.startswith(made) else why
            place = plain_name(place.rsplit(".", 1)[0] if p.ndim < 3 else place)
            if other := inside(name, others):
                place, why = other, "not of the text part"
            group = (place, why, id(p) in adapter)
            groups[group] = groups.get(group, 0) + left
    rest = [
        {"name": n, "parameters": c, "share": c / total, "why": why} | ({"trained": True} if own else {})
        for (n, why, own), c in groups.items()
    ]
    covered = total - sum(groups.values())
    learnt = sum(sizes[p] for p in module.parameters() if id(p) in adapter)
    left = sum(c for (_, _, own), c in groups.items() if own)
    ordered = sorted(rest, key=lambda u: -u["parameters"])
    return Coverage(covered, total, ordered, held_in(x.modules[0] for x in layers), learnt, learnt - left)


def _why(name: str, parameter: nn.Parameter, linear: bool) -> str:
    if parameter.ndim >= 3 and not linear:
        return f"weights of {parameter.ndim} axes cannot be tracked"
    if re.search(r"embed|wte|wpe", name, re.IGNORECASE):
        return "embedding"
    if re.search(r"norm|ln_|layernorm", name, re.IGNORECASE) or (parameter.ndim == 1 and not linear):
        return "norm or vector"
    if re.search(r"lm_head|embed_out", name):
        return "language-model head"
    return "not chosen by --layers" if linear else "not a linear layer"
