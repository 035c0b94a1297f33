"""Artifacts: a stage turns inputs and a small configuration into one immutable directory.

    STAGE/key.json            what it is made from: stage, schema, inputs' fingerprints, configuration, conventions
    STAGE/unit-000007.*       the result of one unit of work (a span of batches), while the stage runs
    STAGE/sum-000008.*        the sum of units 0..7, where the units add up
    STAGE/manifest.json       written last: the key again and what was measured; its presence means *done*

Every file is written under a temporary name, flushed, and renamed, so a kill at any moment costs at most the unit in
hand.  Partial results add up in unit order, so a resumed run equals an uninterrupted one bit for bit.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from upriver.errors import ConfigError, MismatchError, StorageError
from upriver.runtime import dist

SCHEMA = 1
Tensors = dict[str, Tensor]
Form = tuple[str, list[int]]  # a tensor's type, as safetensors names it, and shape
DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}
DTYPE_BYTES = {"F32": 4, "F64": 8, "BF16": 2, "I64": 8}


def digest(value: Any) -> str:
    """A short hash of anything that JSON can write, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def file_digest(path: Path) -> str:
    """A hash of a file's content."""
    with open(path, "rb") as source:
        return hashlib.file_digest(source, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success flush it to the disk and rename it to ``path``.

    Raises:
        StorageError: the disk is full.
        ConfigError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _storage_error(path, error) from error
    finally:
        with suppress(OSError):  # of a place that is no folder, which is told above
            temporary.unlink(missing_ok=True)


def _storage_error(path: Path, error: Exception) -> Exception:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return StorageError(
            f"the disk is full: {path} could not be written; what was finished before is kept, "
            "free some space and give the same command again"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
        return ConfigError(f"cannot write the output: got {path} ({error}); choose a folder that you may write to")
    return StorageError(f"could not write {path}: {error}")


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        content = text.encode()
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        content = (json.dumps(value, indent=1) + "\n").encode()
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}; delete its folder and give the same command again") from error


def write_tensors(path: Path, tensors: Tensors) -> None:
    write_stream(path, {name: form_of(t) for name, t in tensors.items()}, tensors.__getitem__)


def read_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read {path}: {error}; delete its folder and give the same command again") from error


@contextmanager
def opened(path: Path, advice: str = "delete its folder and give the same command again") -> Iterator[Any]:
    """The tensors of a file, read one by one when they are asked for: ``file.get_tensor(name)``."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read {path}: {error}; {advice}") from error


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file, which is mapped into memory no longer than the tensor lives: touched pages count as resident."""
    with opened(path) as file:
        return file.get_tensor(name)


class Artifact:
    """One stage's directory, opened to be filled or, when its key matches, to be used as it is.

    Example:
        >>> stage = Artifact.open(Path("factors/covariance"), "covariance", {"seed": 0})
        >>> if not stage.done:
        ...     total = accumulate(stage, dist.dealt(n_units), n_units, compute)
        ...     stage.finish({"tokens": 1000})
    """

    def __init__(self, path: Path, key: dict[str, Any]):
        self.path = path
        self.key = key

    @classmethod
    def open(cls, path: Path, name: str, key: dict[str, Any], overwrite: bool = False) -> "Artifact":
        """Open ``path`` for the stage ``name`` made from ``key``; ``overwrite`` replaces what is done or made from another key.

        Raises:
            MismatchError: the folder holds the result of another key, or something that is not ours.
            ConfigError: the folder cannot be written.
        """
        head = {"stage": name, "schema": SCHEMA}  # first: the first difference is the one that is named
        stage = cls(path, json.loads(json.dumps(head | key | head)))
        dist.on_first(lambda: stage._make_ready(overwrite))
        if read_json(path / "key.json") != stage.key:  # a process that was started with something else
            stage._refuse(read_json(path / "key.json"))
        return stage

    def _make_ready(self, overwrite: bool) -> None:
        if (self.path / "key.json").exists():
            found = read_json(self.path / "key.json")
            if not _is_key(found):
                self._refuse_foreign("key.json")
            if found == self.key and not (overwrite and self.done):
                return
            same_kind = found["stage"] == self.key["stage"]
            if found != self.key and _holds_work(self.path) and not (overwrite and same_kind):
                self._refuse(found)
            _empty(self.path)
        self._claim()

    def _claim(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        except OSError as error:
            raise _storage_error(self.path, error) from error
        if foreign:
            self._refuse_foreign(foreign[0])
        write_json(self.path / "key.json", self.key)

    def _refuse_foreign(self, name: str) -> None:
        raise MismatchError(
            f"the folder is not empty and not an artifact of this program: got {self.path} with {name!r} in it; "
            "choose another folder"
        )

    def _refuse(self, found: dict[str, Any]) -> None:
        difference = first_difference(found, self.key)
        assert difference
        name, old, new = difference
        choice = (
            "choose another folder"
            if name == "stage"
            else ("choose another folder, go back to the earlier value, or add --overwrite to replace it")
        )
        raise MismatchError(f"{self.path} was made with another {name}: got {new!r} now, {old!r} then; {choice}")

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json")

    def finish(self, info: dict[str, Any]) -> None:
        """Mark the stage done: from now on it is only read."""
        write_json(self.path / "manifest.json", {"key": self.key, **info})

    def unit_path(self, unit: int, suffix: str = "safetensors") -> Path:
        return self.path / f"unit-{unit:06d}.{suffix}"

    def has(self, unit: int) -> bool:
        return self.unit_path(unit).exists()

    def commit(self, unit: int, tensors: Tensors) -> None:
        write_tensors(self.unit_path(unit), tensors)

    def read(self, unit: int) -> Tensors:
        return read_tensors(self.unit_path(unit))


def _is_key(found: Any) -> bool:
    return isinstance(found, dict) and {"stage", "schema"} <= found.keys()


def _is_ours(path: Path) -> bool:
    """Whether a folder holds a key of a stage, rather than somebody's file of that name."""
    try:
        return _is_key(json.loads((path / "key.json").read_bytes()))
    except (OSError, ValueError, RecursionError):
        return False


def _holds_work(path: Path) -> bool:
    """Whether anything was finished here: a folder of keys alone has nothing to lose and may change its owner."""
    files = (p.name for p in path.rglob("*") if p.is_file())
    return any(name != "key.json" and not name.startswith(".") for name in files)


def _empty(path: Path) -> None:
    """Remove what is in ``path``, but not the lock that is held on it.

    Killed on the way it leaves a folder that is not done, and that is still ours: the manifest goes first, the key last,
    and a stage inside disappears at once, under a name that does not count.
    """
    entries = sorted(path.iterdir(), key=lambda p: (p.name == "key.json", p.name != "manifest.json", p.name))
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            hidden = entry if entry.name.startswith(".") else path / f".{entry.name}.old"
            entry.rename(hidden)
            shutil.rmtree(hidden)
        elif entry.name != ".lock":
            entry.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` for this run: two runs that fill one folder at the same time would spoil each other's work."""
    if os.fsencode(path).decode(errors="replace") != str(path):
        raise ConfigError(
            f"the folder's name is not UTF-8, which its files could not be read by: got {str(path)!r}; choose another"
        )
    with ExitStack() as held:
        dist.on_first(lambda: held.enter_context(_locked(path)))
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        there = (path / ".lock").exists()
        lock = open(path / ".lock", "a")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise _storage_error(path, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"another run is writing to {path}; wait until it ends, or choose another folder"
                ) from error
            warnings.warn(f"{path} cannot be locked ({error}): give no second command for it meanwhile", stacklevel=2)
        if _is_ours(path):
            _clear_debris(path)
        try:
            yield
        finally:
            if not there and not _is_ours(path):  # a folder that was refused is left as it was
                (path / ".lock").unlink(missing_ok=True)


def _clear_debris(path: Path) -> None:
    """Remove what a killed run left half-written or half-removed in a folder of ours."""
    for written in path.rglob(".*.tmp"):
        written.unlink(missing_ok=True)
    for removed in path.glob(".*.old"):
        shutil.rmtree(removed, ignore_errors=True)


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first entry, in key order, in which two nested dictionaries differ: its dotted name and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = first_difference(
                old.get(key, "nothing"), new.get(key, "nothing"), f"{name}.{key}" if name else str(key)
            )
            if found:
                return found
        return None
    return None if old == new else (name, old, new)


def form_of(tensor: Tensor) -> Form:
    return DTYPE_NAMES[tensor.dtype], list(tensor.shape)


def write_stream(path: Path, forms: dict[str, Form], tensor: Callable[[str], Tensor]) -> None:
    """A safetensors file written one tensor at a time, so that never more than one is held.

    Args:
        forms: each tensor's type, by its name in the format, and its shape.
        tensor: gives the tensor of a name; asked once for each, in order.
    """
    header, end = {}, 0
    for name, (dtype, shape) in forms.items():
        start, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    with atomic(path) as temporary, open(temporary, "wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name, form in forms.items():
            value = tensor(name).detach().cpu().contiguous()
            assert form_of(value) == form
            sink.write(value.flatten().view(torch.uint8).numpy().data)


def write_array(path: Path, array: np.ndarray) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as sink:
        np.save(sink, array, allow_pickle=False)
