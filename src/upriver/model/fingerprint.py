"""What a module and a task are, for the fingerprint of a model: numbers by content, classes by name and source text."""

import ast
import hashlib
import inspect
import re
import sys
import textwrap
from abc import ABC
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

from upriver.model.adapter import adapter_form
from upriver.model.losses import Task
from upriver.runtime.artifact import digest

ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)  # of a function that a module shows
# Told by name, as versions differ; a class of tasks that `type` makes is said to be of the module abc.
LIBRARIES = {"upriver", "torch", "transformers", "peft", "numpy", *sys.stdlib_module_names} - {"abc"}
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
NOT_TOLD = (
    "transformers_version",
    "dtype",
    "torch_dtype",
)  # of a configuration: not what a model is, but how it is held
NARROWER = {torch.float64: torch.float32, torch.float32: torch.bfloat16}
MEASUREMENT = ("measurement",)  # asks of a model and makes no other of it


def task_form(task: Task) -> list[Any]:
    """What makes the loss of a task: its class and attributes, all but its measurement; nothing for that of language models."""
    own = [text for kind in type(task).__mro__ if not _installed(kind) and (text := written(kind, MEASUREMENT))]
    base = next(kind.__qualname__ for kind in type(task).__mro__ if _installed(kind))
    held = {name: x for name, x in vars(task).items() if name not in MEASUREMENT}
    return [[base, own, content(held)]] if own or held or base != "LanguageModel" else []


def measured_by(task: Task) -> list[str]:
    """The measurement of a task: the name of the method, and a hash of its source and that of those it overrides."""
    found = [x["measurement"] for x in (vars(task), *map(vars, type(task).__mro__)) if "measurement" in x]
    return [getattr(found[0], "__qualname__", type(found[0]).__qualname__), digest(list(map(content, found)))]


def module_form(module: nn.Module) -> Any:
    """The architecture of a module: its configuration without version and type, or what it shows and how it is set;
    and the source of classes that are no installed package's."""
    config, kinds = getattr(module, "config", None), {kind for m in module.modules() for kind in type(m).__mro__}
    own = sorted((content(kind) for kind in kinds if not _installed(kind)), key=digest)
    if isinstance(config, PretrainedConfig):
        known: Any = {k: v for k, v in config.to_diff_dict().items() if k not in NOT_TOLD}
        form = adapter_form(module)
        return [known, own, form] if form else [known, own] if own else known
    public = {
        f"{n}.{k}": x for n, m in module.named_modules() for k, x in vars(m).items() if k[0] != "_" and k != "training"
    }
    settings = {name: ADDRESS.sub("", repr(x)) for name, x in public.items() if isinstance(x, (*PLAIN, tuple, list))}
    return [ADDRESS.sub("", repr(module)), settings, content(config), own]


def tensor_hash(x: Tensor) -> str:
    """A hash of shape and numbers, the same in every floating-point type that holds these numbers as they are.

    No copy is made of what is dense, on the CPU, and in the narrowest such type.
    """
    flat = x.detach().cpu().contiguous().view(-1)
    flat = flat.float() if flat.dtype == torch.float16 else flat
    while flat.dtype in NARROWER and _fits(flat, NARROWER[flat.dtype]):
        flat = flat.to(NARROWER[flat.dtype])
    found = hashlib.blake2b(f"{flat.dtype}{tuple(x.shape)}".encode(), digest_size=16)
    found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _fits(flat: Tensor, narrow: torch.dtype) -> bool:
    return all(torch.equal(part.to(narrow).to(part.dtype), part) for part in flat.split(1 << 18))


def _array_hash(array: Any) -> str:
    found = hashlib.blake2b(f"{array.dtype}{tuple(array.shape)}".encode(), digest_size=16)
    found.update(array.tobytes())
    return found.hexdigest()


def content(value: Any, around: tuple[int, ...] = ()) -> Any:
    """A value as JSON can write it: tensors by what they hold, functions and classes by their source, objects by attributes."""

    def inner(x: Any) -> Any:
        return "around" if id(x) in around else content(x, (*around, id(value)))

    match value:
        case Tensor():
            return tensor_hash(value)
        case np.ndarray() | np.generic():
            return inner(value.tolist()) if value.dtype.hasobject else _array_hash(value)
        case dict():
            return sorted(([inner(k), inner(v)] for k, v in value.items()), key=digest)
        case list() | tuple():
            return [type(value).__qualname__, *map(inner, value)]
        case set() | frozenset():
            return sorted(map(inner, value), key=digest)
        case nn.Module():
            return [module_form(value), inner(dict(value.state_dict()))]
        case type() | FunctionType():
            return [value.__qualname__, "" if _installed(value) else written(value)]
        case _ if isinstance(value, PLAIN):
            return [type(value).__qualname__, repr(value)]
    installed, held = _installed(type(value)), getattr(value, "__dict__", {})
    return [inner(type(value)), inner({name: x for name, x in held.items() if name[0] != "_" or not installed})]


@cache
def written(thing: type | FunctionType, without: tuple[str, ...] = ()) -> str:
    """The source of a class or function but for comments, its docstring, and the definitions of some names; where nobody has it,
    as in a notebook, the instructions and plain constants instead.  Empty where nothing is left."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
        for x in ast.walk(tree):
            if isinstance(x, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(x) is not None:
                del x.body[0]
        body: list[Any] = [x for x in tree.body if getattr(x, "name", None) not in without]  # type: ignore
    except (OSError, TypeError, SyntaxError, AttributeError, ValueError):
        parts = {"f": thing} if isinstance(thing, FunctionType) else vars(thing)
        hidden = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "_abc_impl", *without}
        forms = [[name, code] for name, x in parts.items() if name not in hidden and (code := _code(x)) is not None]
        return repr(forms) if forms else ""
    given = [tree.args] if isinstance(tree, ast.FunctionDef) else []
    return "".join(ast.dump(x) for x in [*given, *body] if not isinstance(x, ast.Pass))


def _code(x: Any) -> Any:
    """The instructions, names and plain constants of a function; a plain value; None for others."""
    if isinstance(x, FunctionType):
        constants = [repr(k) for k in x.__code__.co_consts if isinstance(k, PLAIN)]
        return [x.__code__.co_code.hex(), x.__code__.co_names, constants]
    return repr(x) if isinstance(x, PLAIN) else None


def _installed(thing: Any) -> bool:
    """Whether a class or function is of an installed package, and so told by name."""
    package = (getattr(thing, "__module__", None) or "").split(".")[0]
    if thing is ABC or package in LIBRARIES:
        return True
    return package != "__main__" and "-packages" in (getattr(sys.modules.get(package), "__file__", None) or "")
