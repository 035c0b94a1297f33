"""A pretended GPU: tensors that say that they are on ``cuda:0``, keep their numbers on the CPU, and refuse what a GPU refuses.

    with pretended.gpu() as seen:
        module.to("cuda")  # and whatever is computed with it
    print(seen)  # how often the host waited for the device, and what was copied, by the line of ours that asked for it

It fails where tensors of two devices meet, where NumPy is given one of the device, and where a tensor that a stream of its own
copies is used before that stream was waited for.  It knows nothing of speed and of the device's memory.

Underneath such a tensor is one of the device ``meta``, as in ``torch``'s own FakeTensor, so that autograd asks no CUDA library;
``meta`` therefore stands for the pretended device wherever C++ names it.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import upriver

SOURCE = str(Path(upriver.__file__).parent)
DEVICE = torch.device("cuda", 0)
FREE = 8 << 30  # bytes that the device says it has

# What a host cannot go on without: the size of what comes out, or whether it is sound, is known on the device alone.
ASKING = {
    f"aten::{name}" for name in (
        "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "linalg_eigh", "linalg_svd",
        "masked_select", "nonzero", "unique_consecutive", "unique_dim",
    )
}  # fmt: skip
PINNING = {"aten::pin_memory", "aten::_pin_memory"}
COPYING = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::_unsafe_index"}
PUTTING = {"aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put"}


class Seen:
    """Counts by what it was and the line of ours that asked for it."""

    def __init__(self) -> None:
        self.by_line: Counter[tuple[str, str]] = Counter()

    def note(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(SOURCE):
            frame = frame.f_back
        line = f"{frame.f_code.co_filename[len(SOURCE) + 1 :]}:{frame.f_lineno}" if frame else "elsewhere"
        reader = "" if threading.current_thread() is threading.main_thread() else " beside"
        self.by_line[what + reader, line] += 1

    def count(self, what: str) -> int:
        """``wait``: the main thread stood until the device had done all that it was given; ``to host``, ``to device``: copies.

        What other threads did is counted apart, as ``wait beside`` and so on.
        """
        return sum(n for (kind, _), n in self.by_line.items() if kind == what)

    def __str__(self) -> str:
        return "\n".join(f"{n:6} {what:18} {line}" for (what, line), n in self.by_line.most_common())


class _Local(threading.local):
    stream: "Stream | None" = None


_now = _Local()
_seen = Seen()
_PINNED = WeakIdKeyDictionary()  # tensors of the host


class Stream:
    """A stand-in for ``torch.cuda.Stream``: what was done on it is there for another one that has waited."""

    def __init__(self, device: Any = None):
        self.done = 0  # operations that it was given
        self.knows: dict[Stream, int] = {}  # how far another one had come when it was waited for

    def record_event(self) -> tuple["Stream", int]:
        return self, self.done

    def wait_event(self, event: tuple["Stream", int]) -> None:
        self.knows[event[0]] = max(event[1], self.knows.get(event[0], 0))


MAIN = Stream()


@contextmanager
def _on(stream: Stream) -> Iterator[None]:
    before, _now.stream = _now.stream, stream
    try:
        yield
    finally:
        _now.stream = before


class OnGPU(Tensor):
    """A tensor of the pretended device, whose numbers are those of ``held``."""

    held: Tensor
    made: tuple[Stream, int]
    used_on: set[Stream]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, made: tuple[Stream, int] = (MAIN, 0)) -> "OnGPU":
        meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, meta)
        self.held, self.made, self.used_on = held, made, {made[0]}
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first"
        )

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    def cpu(self, *args: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Stream) -> None:
        self.used_on.add(stream)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:  # two views of one tensor share it
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            like = self.detach().clone()
            memo[id(self)] = torch.nn.Parameter(like, self.requires_grad) if getattr(self, "_is_param", False) else like
        return memo[id(self)]

    def __setitem__(self, at: Any, value: Any) -> None:
        """A number is filled in, as on a GPU: from C++ it would come as a tensor of ``meta``."""
        if isinstance(value, int | float | bool):
            value = OnGPU(torch.tensor(value, dtype=self.dtype))
        Tensor.__setitem__(self, at, value)

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.held!r})"


def _held(x: Any) -> Any:
    """Arguments with the numbers in the place of the tensors; lists of tensors are the deepest that operations are given."""
    if isinstance(x, OnGPU):
        return x.held
    return type(x)(_held(y) for y in x) if type(x) in (list, tuple) else x


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in args:
        if isinstance(x, Tensor):
            found.append(x)
        elif type(x) in (list, tuple):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


class Operation(NamedTuple):
    name: str
    written: list[int | str]  # arguments that it writes to: their places, or names

    def targets(self, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        found = (kwargs.get(at) if isinstance(at, str) else args[at] for at in self.written)
        return [x for x in found if isinstance(x, OnGPU)]


@cache
def _operation(func: Any) -> Operation:
    places = enumerate(func._schema.arguments)
    written = [a.name if a.kwarg_only else i for i, a in places if a.alias_info is not None and a.alias_info.is_write]
    return Operation(func._schema.name, written)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Do what was asked for with the numbers, if a GPU would have done it."""
    tensors = _tensors((*args, *kwargs.values()))
    ours = [x for x in tensors if isinstance(x, OnGPU)]
    asked, operation = kwargs.get("device"), _operation(func)
    on_device = bool(ours) if asked is None else torch.device(asked).type in ("cuda", "meta")
    if operation.name in PINNING:
        _PINNED[pinned := args[0].clone()] = True
        return pinned
    if not ours and not on_device:
        return func(*args, **kwargs)
    stream = _now.stream or MAIN
    _check(func, operation.name, tensors, ours, stream)
    if operation.name in COPYING:
        _note_copy(operation.name, args, kwargs, on_device)
    elif operation.name in INDEXING | PUTTING:
        _check_index(func, args, operation.name in PUTTING)
    elif operation.name in ASKING and ours:
        _seen.note("wait")
    if operation.name == "aten::_efficientzerotensor":  # a tangent without numbers, which only C++ knows to be zero
        func = torch.ops.aten.zeros.default
    here = {name: _held(x) for name, x in kwargs.items()} | ({} if asked is None else {"device": torch.device("cpu")})
    out = func(*map(_held, args), **here)
    stream.done += 1
    if written := operation.targets(args, kwargs):  # in place, or into a tensor that was given
        for x in written:
            x.made = stream, stream.done
        return written[0] if len(written) == 1 else tuple(written)
    if not on_device:
        return out.clone() if ours and out is ours[0].held else out
    return _given_out(out, (stream, stream.done))


def _check(func: Any, name: str, tensors: list[Tensor], ours: list[OnGPU], stream: Stream) -> None:
    for x in ours:
        maker, at = x.made
        if maker not in (stream, MAIN) and stream.knows.get(maker, 0) < at:
            raise RuntimeError(f"{func} uses a tensor that another stream makes, which was not waited for")
        if stream not in x.used_on and maker is not MAIN:
            raise RuntimeError(f"{func} uses a tensor of another stream's memory without record_stream")
    meets = name not in COPYING | INDEXING | PUTTING and any(x.ndim and not isinstance(x, OnGPU) for x in tensors)
    if ours and meets:
        _refuse(func, tensors)


def _given_out(out: Any, made: tuple[Stream, int]) -> Any:
    if isinstance(out, Tensor):
        return OnGPU(out, made)
    return type(out)(_given_out(x, made) for x in out) if type(out) in (list, tuple) else out


def _note_copy(name: str, args: tuple, kwargs: dict[str, Any], on_device: bool) -> None:
    """A copy from or to the host; the host goes on at once only where its memory is pinned and it said that it need not wait."""
    if name == "aten::copy_":
        source, on_device, ahead = args[1], isinstance(args[0], OnGPU), len(args) > 2 and args[2]
    else:
        source, ahead = args[0], kwargs.get("non_blocking")
    if isinstance(source, OnGPU) == on_device:
        return
    _seen.note("to device" if on_device else "to host")
    if not (ahead and (source in _PINNED or not on_device)):
        _seen.note("wait")


def _check_index(func: Any, args: tuple, puts: bool) -> None:
    base, places = args[0], [x for x in args[1] if x is not None]
    if not isinstance(base, OnGPU):
        if any(isinstance(x, OnGPU) for x in places) or (puts and isinstance(args[2], OnGPU)):
            _refuse(func, [base, *places])
        return
    if puts and args[2].ndim and not isinstance(args[2], OnGPU):
        _refuse(func, [base, args[2]])
    for x in places:
        if not isinstance(x, OnGPU):
            _seen.note("to device")
        fills = puts and args[2].numel() == 1  # under a mask, which need not be counted for that
        if not isinstance(x, OnGPU) or (x.dtype in (torch.bool, torch.uint8) and not fills):
            _seen.note("wait")


def _refuse(func: Any, tensors: list[Tensor]) -> None:
    shown = ", ".join(f"{'cuda:0' if isinstance(x, OnGPU) else 'cpu'} {tuple(x.shape)}" for x in tensors)
    raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {shown}")


class _Mode(TorchDispatchMode):
    """Makes tensors of the device where no argument is one yet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def gpu() -> Iterator[Seen]:
    """The pretended device is there inside; yields what is seen of it."""
    global _seen
    _seen, submit = Seen(), ThreadPoolExecutor.submit

    def within(self: Any, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            with _Mode():
                return work(*args, **kwargs)

        return submit(self, inside)

    stands_in = {
        "_lazy_init": lambda: None, "empty_cache": lambda: None, "synchronize": lambda device=None: _seen.note("wait"),
        "memory_allocated": lambda device=None: 0, "mem_get_info": lambda device=None: (FREE, FREE),
        "Stream": Stream, "stream": _on, "current_stream": lambda device=None: _now.stream or MAIN,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, value in stands_in.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", within))
        stack.enter_context(_Mode())
        yield _seen
