"""Adapters of the package ``peft``: a folder that holds one is a model, its base with what was trained beside it.

The matrices of a LoRA are two linear layers, ``B A``, a vector of IA3 is one, and what they see and give is all that is needed of
them.  Everything here is read off the module as ``peft`` has it; nothing of that package is imported before there is an adapter.
"""

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from upriver.errors import ConfigError, ModelError
from upriver.model.experts import experts_of, wraps_experts
from upriver.model.parts import parts_of
from upriver.runtime.files import load_json

FILE = "adapter_config.json"
HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # a name there
KINDS = {"LORA", "IA3"}
PACKAGES = "peft", "accelerate"
WRAPPED = re.compile(r"\.base_layer(?=\.|$)|\.modules_to_save\.[^.]+|(?:(?<=\.lora_[AB])|(?<=\.ia3_l))\.[^.]+")


class Adapter(NamedTuple):
    """Where an adapter is, and what it was trained on."""

    place: str
    base: str  # a folder, a file or a hub name
    kind: str


class Trained(NamedTuple):
    """What the active adapters of a module trained, by names in it; empty for a module without any."""

    layers: frozenset[str]  # modules: a LoRA's factors, layers that were saved whole
    parameters: frozenset[int]  # by ``id``, with those that belong to no layer
    own: frozenset[str]  # modules of the adapters themselves: they are no part of the base's MLP or attention
    idle: frozenset[str]  # modules that no forward pass goes through: of adapters that are off, and what they replace


NOTHING = Trained(*(frozenset[Any]() for _ in range(4)))


def adapter_at(path: str, base: str | None) -> Adapter | None:
    """The adapter in a folder or on the hub, with its base: one that is given, lies beside it, or is named; None: there is none.

    Raises:
        ConfigError: a base was given for what is no adapter.
        ModelError: it is of another kind than LoRA and IA3, names no base, or the packages that load it are missing.
    """
    place = Path(path)
    try:
        place = place if place.exists() or not HUB.fullmatch(path) else _of_hub(path)
        there = (place / FILE).is_file()
    except (OSError, ValueError):  # who looks up the model says what is wrong with it
        there = False
    if not there:
        if base is not None:
            raise ConfigError(
                f"bad value for --base: got {base!r}, and {path!r} holds no {FILE}; leave it out, or give an adapter"
            )
        return None
    told: Any = load_json(place / FILE, "put a sound copy there")
    told = told if isinstance(told, dict) else {}
    kind, named = str(told.get("peft_type")), told.get("base_model_name_or_path")
    check_kind(kind, repr(path))
    task = told.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"{path!r} holds an adapter of another model than a causal language model: got the task {task}; load it with its "
            "base in Python and give up.Model(module, task=...)"
        )
    beside = str(place) if (place / "config.json").exists() and _weights(place) else None
    found = base or beside or (named and _relative(place, str(named)))
    if not found:
        raise ModelError(f"{path!r} holds an adapter ({kind}) that names no base; give it with --base PATH")
    if not all(map(find_spec, PACKAGES)):
        raise ModelError(
            f"{path!r} holds an adapter ({kind} of {found!r}), which the package peft loads and which is not installed: "
            "pip install 'upriver[peft]'"
        )
    return Adapter(str(place), str(found), kind)


def _of_hub(name: str) -> Path:
    """Where the files of an adapter on the hub are kept here; another model's name is no such place."""
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    there = cached_file(name, FILE, _raise_exceptions_for_missing_entries=False)
    return Path(snapshot_download(name, allow_patterns=["adapter_*", "*.json", "*.txt", "*.model"]) if there else name)


def check_kind(kind: str, where: str) -> None:
    if kind not in KINDS:
        raise ModelError(
            f"adapters of the kind {kind} cannot be used: got one in {where}; what is tracked is the matrices of a LoRA (DoRA "
            "and rsLoRA too) and the vectors of IA3. Merge it into its base where its kind can be merged, and give that: "
            "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(another)"
        )


def _weights(place: Path) -> bool:
    ends = "safetensors", "bin", "gguf"
    return any(not x.name.startswith("adapter_") for end in ends for x in place.glob(f"*.{end}"))


def _relative(place: Path, named: str) -> str:
    """A base that is named by a path is looked up from here, then from the adapter's folder."""
    inside = place / named
    return str(inside) if not Path(named).exists() and (inside / "config.json").exists() else named


def with_adapter(module: Any, adapter: Adapter) -> Any:
    """The base with its adapter, apart from each other, as ``peft`` has them; in the types of the base's layers.

    Raises:
        ModelError: the adapter does not fit the base: weights of it would be dropped, or drawn at random.
    """
    from peft import PeftConfig, PeftModel

    shown = f"the adapter in {adapter.place!r}"
    try:
        config = PeftConfig.from_pretrained(adapter.place)
        config.inference_mode = True
        wrapped = PeftModel(module, config, autocast_adapter_dtype=False)
        report = wrapped.load_adapter(adapter.place, "default", torch_device="cpu", autocast_adapter_dtype=False)
    except Exception as error:  # peft raises many kinds here
        said = " ".join(str(error).split())[:240].rstrip(".;")
        raise ModelError(
            f"{shown} does not fit its base {adapter.base!r}: {type(error).__name__}: {said}; give the base that it was trained "
            "on with --base PATH"
        ) from error
    for what, keys in (("have no place in the base", report.unexpected_keys), ("are missing", report.missing_keys)):
        if keys:
            raise ModelError(
                f"{shown} does not fit its base {adapter.base!r}: {len(keys)} of its weights {what}, the first is {min(keys)!r}; "
                "give the base that it was trained on with --base PATH, and a complete copy of the adapter"
            )
    return unwrapped(wrapped)


def unwrapped(module: Any) -> Any:
    """The base model of a ``PeftModel``, whose layers hold the adapters; any other module as it is.

    Raises:
        ModelError: the adapters are of another kind than LoRA and IA3.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return module
    configs = getattr(module, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        check_kind(str(getattr(config.peft_type, "value", config.peft_type)), f"a {type(module).__name__}")
    if isinstance(module, peft.PeftModel | peft.PeftMixedModel):
        module = module.get_base_model() if isinstance(module, peft.PeftModel) else module.base_model.model
    for name, m in _tuners(module):
        odd = [
            type(x).__name__ for x in getattr(m, "lora_variant", {}).values() if not type(x).__name__.startswith("Dora")
        ]
        if odd:
            raise ModelError(
                f"a LoRA with {odd[0]} cannot be used: got one at {name!r}; what is tracked is the matrices of a plain LoRA, "
                "DoRA and rsLoRA"
            )
    return module


def _tuners(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that ``peft`` has put into a model: around a layer, or in the place of one that was trained whole."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    yield from ((n, m) for n, m in module.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))


def trained(module: nn.Module) -> Trained:
    """What the adapters of a module trained that a forward pass goes through now: neither off nor merged into the base."""
    layers: set[str] = set()
    held: set[int] = set()
    own: set[str] = set()
    idle: set[str] = set()
    for name, m in _tuners(module):
        on = [] if m.disable_adapters or getattr(m, "merged", False) else list(m.active_adapters)
        saved = getattr(m, "modules_to_save", {})
        if any(a in saved for a in on):
            idle |= _below(m, name, "original_module")
        for key, x in (experts_of(m) if wraps_experts(m) else parts_of(m)).items():
            (p,), adapter = x.stored.values(), next(iter(x.stored)).split(".")[1]
            own.add(f"{name}.{key}")
            (layers if adapter in on else idle).add(f"{name}.{key}")
            held |= {id(p)} if adapter in on else set()
        for part in m.adapter_layer_names:
            each: Any = getattr(m, part)
            for adapter in each if isinstance(each, nn.ModuleDict | nn.ParameterDict) else ():
                below = _below(m, name, f"{part}.{adapter}")
                own |= below if part != "modules_to_save" else set()
                if adapter not in on or type(m).__name__ == "ParamWrapper":  # whose layers are never called
                    idle |= below
                layers |= set() if below & idle else below
                if adapter not in on:
                    continue
                x = each[adapter]
                held |= {id(p) for p in x.parameters()} if isinstance(x, nn.Module) else {id(x)}
    held |= {id(p) for p in _biases(module)}
    found = Trained(frozenset(layers), frozenset(held), frozenset(own), frozenset(idle))
    return found if own | layers | idle else NOTHING


def _below(m: Any, name: str, part: str) -> set[str]:
    """The names of the modules in a part of a module; nothing where it is a parameter."""
    try:
        inner = m.get_submodule(part)
    except AttributeError:
        return set()
    return {".".join(filter(None, (name, part, n))) for n, _ in inner.named_modules()}


def _biases(module: Any) -> Iterator[nn.Parameter]:
    """The biases of the base that were trained with its adapters."""
    configs = getattr(module, "peft_config", None)
    asked = {getattr(x, "bias", "none") for x in configs.values()} if isinstance(configs, dict) else set()
    if "all" in asked:
        yield from (p for n, p in module.named_parameters() if n.endswith("bias"))
    elif "lora_only" in asked:
        layers = (m.get_base_layer() for _, m in _tuners(module) if getattr(m, "lora_A", None))
        yield from (m.bias for m in layers if getattr(m, "bias", None) is not None)


def adapter_form(module: nn.Module) -> list[Any]:
    """What the adapters of a module do besides holding weights: which are active, how they are scaled, what is merged."""
    return [
        [
            *(name, type(m).__name__, list(m.active_adapters), bool(m.disable_adapters)),
            list(getattr(m, "merged_adapters", [])),
            {a: repr(s) for a, s in getattr(m, "scaling", {}).items()},
            sorted((a, type(x).__name__) for a, x in getattr(m, "lora_variant", {}).items()),
        ]
        for name, m in _tuners(module)
    ]


def plain_name(name: str) -> str:
    """The name of a layer as its model has it without ``peft``; of a LoRA's factor that of its layer with ``lora_A`` behind."""
    return WRAPPED.sub("", f".{name}").removeprefix(".")


def multiply_directly(modules: Any) -> None:
    """Let DoRA form ``B A`` of its weights: it would call both as layers on an identity, which looks like further tokens.

    It is undone with the attributes that :func:`upriver.model.capture.frozen` restores.
    """
    if "peft" not in sys.modules:
        return
    from peft.tuners.lora.dora import DoraLinearLayer

    for m in modules:
        if type(m) is DoraLinearLayer:
            m.get_lora_weight = _product


def _product(lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Any:
    return lora_B.weight @ lora_A.weight
