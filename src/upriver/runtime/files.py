"""Files of artifacts: they appear whole or not at all, and each says by a checksum where it belongs and what it holds.

    name.json           an object has its checksum in itself, as ``digest``
    name.safetensors    has it in the header's ``__metadata__``, as ``seal``
    all others          are listed with it under ``files`` in the manifest of their artifact, which is written last

A checksum covers the file's name in its artifact and the artifact's key too, so that a file that changed its place, or came
from another run, is noticed as a damaged one is.  It is verified when the file is read, once per process.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from upriver.errors import ConfigError, StorageError

Tensors = dict[str, Tensor]
Form = tuple[str, list[int]]  # a tensor's type, as safetensors names it, and shape
DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}
DTYPE_BYTES = {"F32": 4, "F64": 8, "BF16": 2, "I64": 8}

CHUNK = 8 << 20  # bytes that are hashed at once
DEPTH = 4  # folders of an artifact above a file, at most
UNSEALED = "0" * 32
SEAL = re.compile(rb'"seal": ?"([0-9a-f]{32})"')
HEADS = ("key.json", "manifest.json", "info.json")  # they say themselves what they are of
ADVICE = "delete its folder and give the same command again"
WRONG = "its checksum is not that of its content: it is damaged, or was moved, or belongs to another run"
STRANGE = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.(tmp|partial)")  # the name that it shall get, and the process


def digest(value: Any) -> str:
    """A short hash of anything that JSON can write, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def new_digest() -> Any:
    """The hash of `file_digest`, to be fed."""
    return hashlib.blake2b(digest_size=12)


def file_digest(path: Path) -> str:
    """A hash of a file's content, by which inputs are told apart."""
    with open(plain(path), "rb") as source:
        return hashlib.file_digest(source, new_digest).hexdigest()


class NoFileError(OSError):
    """A pipe, a device or a socket stands where a file should."""

    def __str__(self) -> str:
        return str(self.strerror)


def strange(path: str | Path) -> str | None:
    """What stands at a path, if it is no file or folder: reading it might wait or go on for ever."""
    try:
        return STRANGE.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # there is nothing, or what can be no path at all
        return None


def plain(path: Path) -> Path:
    """The path of a file that can be opened without waiting.

    Raises:
        NoFileError: something else stands there.
    """
    if what := strange(path):
        raise NoFileError(errno.EINVAL, f"{path} is {what} and no file")
    return path


# ---- whole or not at all


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
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):  # of a place that is no folder, which is told above
            temporary.unlink(missing_ok=True)


def storage_error(path: Path, error: Exception) -> Exception:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return StorageError(
            f"the disk is full: {path} could not be written; what was finished before is kept, "
            "free some space and give the same command again"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
        return ConfigError(f"cannot write the output: got {path} ({error}); choose a folder that you may write to")
    return StorageError(f"could not write {path}: {error}")


def abandoned(name: str) -> bool:
    """Whether a file is a temporary one of a process that has ended, or of this one."""
    found = TEMPORARY.fullmatch(name)
    if not found:
        return False
    try:
        os.kill(int(found[2]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return int(found[2]) == os.getpid()


# ---- checksums


_KNOWN: dict[tuple[int, ...], str] = {}  # of files as they stood when this process read or wrote them


def checksum(path: Path) -> str:
    """The hash of a file, of safetensors without the seal in their header; computed once while the file stays as it is."""
    at = _stamp(path)
    if at not in _KNOWN:
        found = xxhash.xxh3_128()
        with open(plain(path), "rb") as source:
            if path.suffix == ".safetensors":
                found.update(SEAL.sub(b"", _header(source)[0]))
            while chunk := source.read(CHUNK):
                found.update(chunk)
        _KNOWN[at] = found.hexdigest()
    return _KNOWN[at]


def _stamp(path: Path) -> tuple[int, ...]:
    at = os.stat(path)
    return at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


def _header(source: Any) -> tuple[bytes, str | None]:
    """The header of a safetensors file that is open at its beginning, and the seal in it."""
    length = source.read(8)
    size = int.from_bytes(length, "little")
    if size > os.fstat(source.fileno()).st_size:
        raise ValueError("the file is cut short, or its header is damaged")
    head = length + source.read(size)
    found = SEAL.search(head)
    return head, found and found[1].decode()


def _place(path: Path) -> list[str]:
    """The name of a file in the nearest artifact around it, and that artifact's key."""
    folders = () if path.name in HEADS else list(path.parents)[:DEPTH]
    for folder in folders:
        if (folder / "key.json").exists():
            return [path.relative_to(folder).as_posix(), _told(folder / "key.json")[0]]
    return [path.name, ""]


def _told(head: Path) -> tuple[str, dict[str, str]]:
    """A hash of what the head of an artifact says, and the files that it lists."""
    return _read(head, *_stamp(head))


@lru_cache(256)
def _read(head: Path, *_: int) -> tuple[str, dict[str, str]]:
    value = read_json(head)
    files = value.get("files") if isinstance(value, dict) else None
    return digest(value), files if isinstance(files, dict) else {}


def _seal(path: Path, held: str) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([*_place(path), held]).encode())


def sealed(path: Path) -> str | None:
    """The seal in the header of a safetensors file of ours.

    Raises:
        OSError, ValueError: it cannot be read, or is no such file.
    """
    with open(plain(path), "rb") as source:
        return _header(source)[1]


def check(path: Path, advice: str = ADVICE) -> None:
    """Verify the checksum of a file: its own, and the one that the manifest of its artifact lists.

    Raises:
        StorageError: the file cannot be read, is damaged, has changed its place, or belongs to another run.
    """
    try:
        listed, held = _listed(path), checksum(path)
        good = listed in (None, held)
        good &= sealed(path) == _seal(path, held) if path.suffix == ".safetensors" else listed is not None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, advice) from error
    if not good:
        raise unreadable(path, WRONG, advice)


def _listed(path: Path) -> str | None:
    """What the manifest of a finished artifact says that the file holds; None: it is not listed."""
    heads = [folder / "manifest.json" for folder in list(path.parents)[:DEPTH] if (folder / "key.json").exists()]
    for head in (path.with_name("info.json"), *heads):
        if head.exists():
            return _told(head)[1].get(path.relative_to(head.parent).as_posix())
    return None


def unreadable(path: Path, why: object, advice: str = ADVICE) -> StorageError:
    return StorageError(f"cannot read {path}: {why}; {advice}")


# ---- JSON


def write_json(path: Path, value: Any, sealed: bool = True) -> None:
    """Write JSON; an object gets its checksum, unless it is no part of an artifact (``sealed``)."""
    if sealed and isinstance(value, dict):
        value = json.loads(json.dumps(value))
        value = value | {"digest": digest([_place(path), value])}
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        held = text.encode()
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        held = (json.dumps(value, indent=1) + "\n").encode()
    with atomic(path) as temporary:
        temporary.write_bytes(held)


def load_json(path: Path, advice: str = ADVICE) -> Any:
    """What a JSON file holds, whoever wrote it.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return json.loads(plain(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error, advice) from error


def read_json(path: Path, advice: str = ADVICE) -> Any:
    """What `write_json` has written: of an object the checksum is verified, and left out; a list is verified by `check`.

    Raises:
        StorageError: it cannot be read, or the checksum does not fit.
    """
    value = load_json(path, advice)
    if not isinstance(value, dict):
        return value
    told = value.pop("digest", None)
    if told != digest([_place(path), value]):
        raise unreadable(path, WRONG, advice)
    return value


# ---- tensors and arrays


def form_of(tensor: Tensor) -> Form:
    return DTYPE_NAMES[tensor.dtype], list(tensor.shape)


def write_tensors(path: Path, tensors: Tensors) -> None:
    write_stream(path, {name: form_of(t) for name, t in tensors.items()}, tensors.__getitem__)


def write_stream(path: Path, forms: dict[str, Form], tensor: Callable[[str], Tensor]) -> None:
    """A safetensors file written one tensor at a time, so that never more than one is held.

    Args:
        forms: each tensor's type, by its name in the format, and its shape.
        tensor: gives the tensor of a name; asked once for each, in order.
    """
    header: dict[str, Any] = {"__metadata__": {"seal": UNSEALED}}
    end = 0
    for name, (dtype, shape) in forms.items():
        start, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    head = len(text).to_bytes(8, "little") + text
    held = xxhash.xxh3_128(SEAL.sub(b"", head))
    with atomic(path) as temporary, open(temporary, "wb") as sink:
        sink.write(head)
        for name, form in forms.items():
            value = tensor(name).detach().cpu().contiguous()
            assert form_of(value) == form
            data = value.flatten().view(torch.uint8).numpy().data
            held.update(data)
            sink.write(data)
        sink.seek(head.index(UNSEALED.encode()))
        sink.write(_seal(path, held.hexdigest()).encode())
    _KNOWN[_stamp(path)] = held.hexdigest()


def read_tensors(path: Path) -> Tensors:
    check(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


@contextmanager
def opened(path: Path, advice: str = ADVICE) -> Iterator[Any]:
    """The tensors of a file, read one by one when they are asked for: ``file.get_tensor(name)``."""
    check(path, advice)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error, advice) from error


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file, which is mapped into memory no longer than the tensor lives: touched pages count as resident."""
    with opened(path) as file:
        return file.get_tensor(name)


def write_array(path: Path, array: np.ndarray) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as sink:
        np.save(sink, array, allow_pickle=False)
