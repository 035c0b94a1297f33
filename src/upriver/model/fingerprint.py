"""What a module and a task are, for the fingerprint of a model: by content and code, so the same in every process."""

import dis
import hashlib
import re
import sys
from collections.abc import Callable
from functools import cached_property, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

from upriver.model.losses import LanguageModel, Task
from upriver.runtime.artifact import digest

ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)  # of a function that a module shows
LIBRARIES = {"upriver", "torch", "transformers", "numpy", *sys.stdlib_module_names}  # told by name: versions differ
CONSTANTS = (bool, int, float, complex, str, bytes, tuple, Tensor, np.ndarray, FunctionType)
UNTOLD = {"measurement", "_heads"}  # of a task: what is asked, and what passes find out
Inner = Callable[[Any], Any]


def task_form(task: Task) -> list[Any]:
    """What makes the loss of a task: its attributes and classes, all but its measurement; nothing for that of language models."""
    form = content(task)
    return [] if form == content(LanguageModel()) else [form]


def measured_by(task: Task) -> list[str]:
    """The measurement of a task: the name of the method, and a hash of its code and that of those it overrides."""
    held = [vars(task), *map(vars, type(task).__mro__)]
    found = [x["measurement"] for x in held if "measurement" in x]
    return [getattr(found[0], "__qualname__", type(found[0]).__qualname__), digest(content(found))]


def module_form(module: nn.Module) -> Any:
    """The architecture of a module: its configuration without the version of transformers, or what it shows and how it is set;
    and the code of classes that are no installed package's."""
    config, own = getattr(module, "config", None), _own_classes(module)
    if isinstance(config, PretrainedConfig):
        known = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
        return [known, own] if own else known
    settings = {
        f"{name}.{n}": repr(x)
        for name, m in module.named_modules()
        for n, x in vars(m).items()
        if n[0] != "_" and n != "training" and _is_setting(x)
    }
    return [ADDRESS.sub("", repr(module)), settings, content(config), own]


def tensor_hash(tensor: Tensor) -> str:
    """A hash of dtype, shape and content; no copy is made of what is dense and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return _bytes_hash(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), flat.numpy())


def content(value: Any, around: tuple[int, ...] = ()) -> Any:
    """A value as JSON can write it: tensors by what they hold, functions by their code, objects by attributes and classes."""
    if id(value) in around:
        return "around"
    form = next(form for kinds, form in FORMS if isinstance(value, kinds))
    name = "Task" if isinstance(value, Task) else type(value).__qualname__  # one that changes no loss is the same
    return [name, form(value, lambda x: content(x, (*around, id(value))))]


def _own_classes(module: nn.Module) -> Any:
    """What the classes of a module and its submodules are written as, where they are no installed package's."""
    kinds = {kind for m in module.modules() for kind in type(m).__mro__}
    return sorted((content(_body(kind)) for kind in kinds if not _installed(kind)), key=digest)


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_setting, value))
    return isinstance(value, bool | int | float | complex | str)


def _bytes_hash(*held: Any) -> str:
    """Of bytes and arrays of bytes."""
    found = hashlib.blake2b(digest_size=16)
    for some in held:
        found.update(some)
    return found.hexdigest()


def _array(array: Any, inner: Inner) -> Any:
    if array.dtype.hasobject:
        return inner(array.tolist())
    return [str(array.dtype), array.shape, _bytes_hash(array.tobytes())]


def _function(value: Any, inner: Inner) -> Any:
    """The code, and what it finds outside: defaults, what it closes over, constants and functions beside it."""
    if isinstance(value, partial):
        return inner([value.func, value.args, value.keywords])
    if not isinstance(value, FunctionType):  # a method, or what makes one of a function
        return inner([getattr(value, name, None) for name in ("__func__", "__self__", "fget", "func")])
    if _package(value) in LIBRARIES:
        return value.__qualname__
    beside = {n: value.__globals__.get(n) for n in sorted(_globals(value.__code__))}
    own = {n: x for n, x in beside.items() if not (isinstance(x, FunctionType) and _installed(x, value))}
    closed = [x.cell_contents for x in value.__closure__ or () if x != CellType()]  # an empty cell has no contents
    constants = {n: x for n, x in own.items() if isinstance(x, CONSTANTS)}
    outside = inner([value.__defaults__, value.__kwdefaults__, closed, constants])
    return [_code(value.__code__, inner, value.__doc__), outside]


def _code(code: CodeType, inner: Inner, said: str | None = None) -> Any:
    """Instructions, names and constants, also of functions inside; not where it stands, nor what it ``said`` of itself."""
    constants = [x for i, x in enumerate(code.co_consts) if i or x is None or x != said]
    each = [_code(x, inner) if isinstance(x, CodeType) else inner(x) for x in constants]
    return [code.co_code.hex(), code.co_names, each]


def _globals(code: CodeType) -> set[str]:
    inside = (_globals(x) for x in code.co_consts if isinstance(x, CodeType))
    return {x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL"}.union(*inside)


def _object(value: Any, inner: Inner) -> Any:
    untold = UNTOLD if isinstance(value, Task) else set()
    slots = (x for k in type(value).__mro__ for x in _several(vars(k).get("__slots__", ())) if x[:2] != "__")
    held = {x: getattr(value, x, None) for x in slots} | getattr(value, "__dict__", {})
    held = {n: x for n, x in held.items() if n not in untold}
    if _installed(type(value)) and not isinstance(value, Task):
        return [ADDRESS.sub("", repr(value)), inner({n: x for n, x in held.items() if n[0] != "_"})]
    return [inner(held), _class(type(value), inner)]


def _several(names: Any) -> Any:
    return (names,) if isinstance(names, str) else names


def _class(kind: type, inner: Inner) -> Any:
    """What a class and those that it is made of add: methods and attributes."""
    if _installed(kind) and not issubclass(kind, Task):
        return kind.__qualname__
    untold = UNTOLD if issubclass(kind, Task) else set()
    bodies = ({n: x for n, x in _body(k).items() if n not in untold} for k in kind.__mro__)
    return [inner(body) for body in bodies if body]


def _body(kind: type) -> dict[str, Any]:
    return {n: x for n, x in vars(kind).items() if _counts(n)}


def _counts(name: str) -> bool:
    """Whether an attribute of a class is the writer's own, not one that Python gives to every class."""
    return name == "__call__" or not name.startswith(("__", "_abc_"))


def _package(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").split(".")[0]


def _installed(value: Any, beside: Any = None) -> bool:
    """Whether a function or class is of an installed package, another one than ``beside``: told by name."""
    package = _package(value)
    place = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in LIBRARIES or ("-packages" in place and package != _package(beside))


FORMS: list[tuple[Any, Callable[[Any, Inner], Any]]] = [  # the first that fits
    ((np.ndarray, np.generic), _array),
    ((type(None), bool, int, float, complex, str, bytes, torch.dtype), lambda x, inner: repr(x)),
    (Tensor, lambda x, inner: tensor_hash(x)),
    (dict, lambda x, inner: sorted(([inner(k), inner(v)] for k, v in x.items()), key=digest)),
    ((list, tuple), lambda x, inner: [inner(v) for v in x]),
    ((set, frozenset), lambda x, inner: sorted((inner(v) for v in x), key=digest)),
    (nn.Module, lambda x, inner: [module_form(x), inner(dict(x.state_dict()))]),
    ((FunctionType, MethodType, staticmethod, classmethod, property, cached_property, partial), _function),
    (type, _class),
    (object, _object),
]
