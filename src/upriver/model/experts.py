"""Mixtures of experts that transformers runs through one interface: each expert's matrix is a layer of its own.

The weights of all experts of a block are one parameter of three axes.  While a pass is captured they go through
:func:`run_experts`, which calls an :class:`Expert` for each expert that has tokens, with these tokens and no others, so that
the hook of capture sees them as it sees the calls of any other layer.

Axes: M tokens of a batch, K experts that each is given to, I inputs and O outputs of a matrix, H width of the model.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from upriver.model.parts import Part, calling_parts, parts_of

INTERFACE = "upriver"  # under which transformers knows our way of running experts
TOLD = {"has_gate", "has_bias", "is_transposed", "_is_expert_parallel"}  # of a module that the interface runs
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, "Expert"]] = weakref.WeakKeyDictionary()


_LORAS: weakref.WeakKeyDictionary[nn.Module, list[tuple]] = weakref.WeakKeyDictionary()  # while they run one by one


class Expert(Part):
    """One matrix of one expert: a slice of a parameter of all experts."""

    def __init__(self, experts: nn.Module, part: str, number: int):
        super().__init__(experts, part, f"{number}.{part}")
        self.number = number

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        """The parameters of all experts that hold this matrix and its bias, by their names in the module of the experts."""
        held = self.owner._parameters
        return {name: p for name in (self.part, f"{self.part}_bias") if (p := held.get(name)) is not None}

    @property
    def index(self) -> tuple[Any, ...]:
        return (self.number,)

    def pieces(self, p: Tensor) -> list[Tensor]:
        return list(p.unbind())

    def joined(self, pieces: list[Tensor]) -> Tensor:
        return torch.stack(pieces)

    @property
    def transposed(self) -> bool:
        return bool(self.owner.is_transposed)

    @property
    def bias(self) -> Tensor | None:
        bias = self.stored.get(f"{self.part}_bias")
        return None if bias is None else bias[self.number]

    def forward(self, a_MI: Tensor, weight: Tensor, bias: Tensor | None, at_M: Tensor, tokens: int) -> Tensor:
        """``W a + b``; which of the batch's ``tokens`` these are is for the hook."""
        return nn.functional.linear(a_MI, weight.T if self.transposed else weight, bias)


class Factor(Expert):
    """``A`` or ``B`` of a LoRA on one matrix of one expert; ``peft`` keeps those of all experts in one linear layer that is never
    called: of ``A [K r, I]`` an expert has ``r`` rows, of ``B [O, r K]`` every ``K``-th column, ``K`` experts in all."""

    def __init__(self, wrapper: Any, factor: str, adapter: str, number: int):
        other = "" if adapter == "default" else f"_{adapter}"
        super().__init__(wrapper, f"{wrapper.parameter_name}_{factor}{other}", number)
        self._key, self._count = f"{factor}.{adapter}.weight", int(wrapper.num_experts)

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        return {self._key: self.owner.get_submodule(self._key.removesuffix(".weight"))._parameters["weight"]}  # type: ignore

    @property
    def _rows(self) -> bool:
        return self._key.startswith("lora_A")

    @property
    def index(self) -> tuple[Any, ...]:
        rank = len(self.stored[self._key]) // self._count
        rows = slice(self.number * rank, (self.number + 1) * rank)
        return (rows,) if self._rows else (slice(None), slice(self.number, None, self._count))

    def pieces(self, p: Tensor) -> list[Tensor]:
        return list(p.chunk(self._count) if self._rows else p.unflatten(1, (-1, self._count)).unbind(-1))

    def joined(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces) if self._rows else torch.stack(pieces, -1).flatten(1)

    @property
    def transposed(self) -> bool:
        return False

    def forward(self, a_MI: Tensor, at_M: Tensor, tokens: int) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(a_MI, self.weight)


def wraps_experts(module: Any) -> bool:
    """Whether this is what ``peft`` puts around experts of the interface to train one of their parameters."""
    return type(module).__name__ == "ParamWrapper" and run_through_interface(module.get_base_layer())


def run_through_interface(module: nn.Module) -> bool:
    """Whether these are experts that transformers runs through its interface, with weights that are not packed."""
    held = [
        module._parameters.get(name)
        for name in ("gate_up_proj" if vars(module).get("has_gate") else "up_proj", "down_proj")
    ]
    return vars(module).keys() >= TOLD and all(p is not None and p.ndim == 3 and p.is_floating_point() for p in held)


def experts_of(module: Any) -> dict[str, Expert]:
    """The matrices of a module of experts, as ``3.down_proj``: of all experts the one, then of all the other."""
    if wraps_experts(module):
        known = _KNOWN.setdefault(module, {})
        for adapter in module.lora_A:
            each = [Factor(module, x, adapter, e) for x in ("lora_A", "lora_B") for e in range(module.num_experts)]
            known |= {key: x for x in each if (key := f"{x.number}.{x.part}") not in known}
        return known
    if not run_through_interface(module):
        return {}
    if module not in _KNOWN:
        parts = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        count = len(module.get_parameter("down_proj"))
        _KNOWN[module] = {f"{e}.{part}": Expert(module, part, e) for part in parts for e in range(count)}
    return _KNOWN[module]


@contextmanager
def run_one_by_one(module: nn.Module) -> Iterator[None]:
    """Experts of ``module`` go through :func:`run_experts` inside, and weights that are layers apart are called."""
    configs: dict[int, Any] = {id(m.config): m.config for m in module.modules() if run_through_interface(m)}
    before = [(c, c._experts_implementation) for c in configs.values()]
    around: list[Any] = [m for m in module.modules() if wraps_experts(m)]
    for m in around:  # or it would add the product to the weights of all experts
        _LORAS.setdefault(m.get_base_layer(), []).extend(_in_use(m))
        m.forward = m.base_layer.__call__
    apart: list[Any] = [m for m in module.modules() if parts_of(m)]
    for m in apart:
        m.forward = partial(calling_parts, m)
    if before:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(INTERFACE, run_experts)
    try:
        for config, _ in before:
            config._experts_implementation_internal = INTERFACE  # the public name would set that of its parts as well
        yield
    finally:
        for m in around:
            _LORAS.pop(m.get_base_layer(), None)
        for m in (*around, *apart):
            vars(m).pop("forward", None)
        for config, name in before:
            config._experts_implementation_internal = name


def _in_use(wrapper: Any) -> list[tuple[str, list[Expert], list[Expert], float]]:
    """Of each active adapter the matrix that it is on, each expert's factors, and what their product is scaled by."""
    held, found = experts_of(wrapper), []
    for adapter in [] if wrapper.disable_adapters or wrapper.merged else wrapper.active_adapters:
        if adapter in wrapper.lora_A:
            parts = (Factor(wrapper, x, adapter, 0).part for x in ("lora_A", "lora_B"))
            of_A, of_B = ([held[f"{e}.{part}"] for e in range(wrapper.num_experts)] for part in parts)
            found.append((wrapper.parameter_name, of_A, of_B, float(wrapper.scaling[adapter])))
    return found


def run_experts(module: Any, hidden_MH: Tensor, chosen_MK: Tensor, weights_MK: Tensor) -> Tensor:
    """What the experts make of each token, weighted and added up, as the interface of transformers has it."""
    held, total_MH = experts_of(module), torch.zeros_like(hidden_MH)
    first, second = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    weights = {
        name: p.unbind(0) for name, p in module.named_parameters(recurse=False) if name.startswith((first, second))
    }
    M, K = chosen_MK.shape
    for e, at_S in _dealt(chosen_MK, len(weights[second])):
        at_M = at_S // K

        def through(part: str, a_MI: Tensor, e: int = e, at_M: Tensor = at_M) -> Tensor:
            bias = weights.get(f"{part}_bias")
            out_MO = held[f"{e}.{part}"](a_MI, weights[part][e], None if bias is None else bias[e], at_M=at_M, tokens=M)
            for name, of_A, of_B, scale in _LORAS.get(module, ()):
                if name == part:
                    out_MO = out_MO + scale * of_B[e](of_A[e](a_MI, at_M=at_M, tokens=M), at_M=at_M, tokens=M)
            return out_MO

        inner = through(first, hidden_MH[at_M])
        out_MH = through(second, module._apply_gate(inner) if module.has_gate else module.act_fn(inner))
        if vars(module).get("has_post_expert_norm"):
            out_MH = module.post_expert_norm(out_MH)
        total_MH = total_MH.index_add(0, at_M, (out_MH * weights_MK.flatten()[at_S, None]).to(total_MH))
    return total_MH


def _dealt(chosen_MK: Tensor, count: int) -> list[tuple[int, Tensor]]:
    """The experts that have tokens, and the places of these in ``chosen_MK`` laid flat; with shapes alone, one has them all."""
    flat_S = chosen_MK.flatten()
    if isinstance(flat_S, FakeTensor) or flat_S.device.type == "meta":
        return [(0, torch.arange(len(flat_S), device=flat_S.device))]
    order_S, counts = flat_S.argsort(stable=True), torch.bincount(flat_S, minlength=count).tolist()
    return [(e, at_S) for e, at_S in enumerate(order_S.split(counts)[:count]) if len(at_S)]


def packed_rows(x_MI: Tensor, at_M: Tensor, N: int, T: int) -> tuple[Tensor, Tensor]:
    """An expert's rows sequence by sequence, ``[N, t, I]`` with zeros where a sequence has fewer, and the position of each row in
    its sequence, ``[N, t]``, or -1.

    Args:
        at_M: where each row stands in a batch of ``N`` sequences of ``T`` positions, ascending.
    """
    n_M = at_M // T
    counts_N = torch.bincount(n_M, minlength=N)
    place_M = torch.arange(len(at_M), device=at_M.device) - (counts_N.cumsum(0) - counts_N)[n_M]
    t = int(counts_N.max())
    x_NtI, at_Nt = x_MI.new_zeros(N, t, x_MI.shape[1]), at_M.new_full((N, t), -1)
    x_NtI[n_M, place_M], at_Nt[n_M, place_M] = x_MI, at_M % T
    return x_NtI, at_Nt
