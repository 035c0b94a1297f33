"""What share of a model its tracked layers are, and what is left out, for which reason."""

import re
from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from upriver.model.experts import Expert, experts_of
from upriver.model.layers import LEFT, Layer, linear_modules, several_matrices
from upriver.model.packed import held_in, parameter_sizes
from upriver.model.text_part import inside, other_parts


class Coverage(NamedTuple):
    """The share of the model's parameters that influence is computed for, and what is left out."""

    tracked: int
    total: int
    untracked: list[dict[str, Any]]  # name, parameters, share, why
    packed: str = ""  # what is said of tracked weights that are held in fewer bits

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Coverage":
        """What a manifest tells of it."""
        return cls(stored["tracked"], stored["total"], stored["untracked"], stored.get("packed", ""))

    @property
    def share(self) -> float:
        return self.tracked / self.total

    def line(self) -> str:
        rest = ", ".join(f"{u['name']} {u['share']:.1%} ({u['why']})" for u in self.untracked[:6])
        line = f"tracked {self.tracked:,} of {self.total:,} parameters ({self.share:.1%}); not: {rest or 'nothing'}"
        return f"{line}; {self.packed}" if self.packed else line


def coverage(module: nn.Module, layers: list[Layer]) -> Coverage:
    """What share of the parameters ``layers`` hold; the rest grouped by place, with the reason it is left out."""
    tracked = {id(p) for layer in layers for m in layer.modules for p in m.parameters(recurse=False)}
    slices = Counter(p for x in layers for m in x.modules if isinstance(m, Expert) for p in m.stored.values())
    linear = {
        f"{name}.{p}" for name, m in linear_modules(module) if not several_matrices(m) for p in ("weight", "bias")
    }
    linear |= {f"{name}.{p}" for name, m in module.named_modules() for x in experts_of(m).values() for p in x.stored}
    sizes, left_out, others = parameter_sizes(module), dict(LEFT.get(module, {})), other_parts(module)
    left_out |= {re.sub(r"\.\d+(\.[^.]+)$", r"\1", name): why for name, why in left_out.items()}  # an expert's, of all
    total = sum(sizes.values())
    groups: dict[tuple[str, str], int] = {}
    for name, p in module.named_parameters():
        left = sizes[p] - slices[p] * p[:1].numel() if p in slices else sizes[p]  # of experts some may be chosen
        if id(p) not in tracked and left:
            place, other = re.sub(r"\.\d+\.", ".*.", f".{name}").lstrip("."), inside(name, others)
            why = (
                left_out.get(name.rpartition(".")[0])
                or left_out.get(name.removesuffix("_bias"))
                or _why(name, p, name in linear)
            )
            group = (
                (other, "not of the text part") if other else (place.rsplit(".", 1)[0] if p.ndim < 3 else place, why)
            )
            groups[group] = groups.get(group, 0) + left
    rest = [{"name": n, "parameters": c, "share": c / total, "why": why} for (n, why), c in groups.items()]
    covered = total - sum(groups.values())
    return Coverage(covered, total, sorted(rest, key=lambda u: -u["parameters"]), held_in(x.modules[0] for x in layers))


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
