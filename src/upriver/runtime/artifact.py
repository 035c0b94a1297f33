"""Artifacts: a stage turns inputs and a small configuration into one immutable directory.

    STAGE/key.json            what it is made from: stage, schema, inputs' fingerprints, configuration, conventions
    STAGE/unit-000007.*       the result of one unit of work (a span of batches), while the stage runs
    STAGE/sum-000008.*        the sum of units 0..7, where the units add up
    STAGE/manifest.json       written last: the key again, what was measured, checksums; its presence means *done*

Every file is written under a temporary name, flushed, and renamed, so a kill at any moment costs at most the unit in
hand.  Partial results add up in unit order, so a resumed run equals an uninterrupted one bit for bit.  What is removed or
replaced is only what was written by this program (`files_of`).
"""

# ruff: noqa: F401 - what its files are made of can be had here too

import errno
import fcntl
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from upriver.errors import ConfigError, MismatchError, StorageError
from upriver.runtime import dist
from upriver.runtime.files import (
    ADVICE,
    TEMPORARY,
    Form,
    Tensors,
    abandoned,
    atomic,
    check,
    checksum,
    digest,
    file_digest,
    form_of,
    load_json,
    new_digest,
    opened,
    plain,
    read_json,
    read_tensor,
    read_tensors,
    sealed,
    storage_error,
    strange,
    unreadable,
    write_array,
    write_json,
    write_stream,
    write_tensors,
)
from upriver.runtime.heads import MANIFESTS, SCHEMA, FitManifest, Info, Manifest, TraceManifest, read_head

HEADS = r"(key|manifest|\.division)\.json"
NAMED = {  # the files of a folder, by its stage
    "fit": re.compile(HEADS),
    "bank": re.compile(HEADS + r"|bank\.parquet"),
    "trace": re.compile(HEADS + r"|(queries|verify)\.json|(scores|documents|top|verify)\.parquet|layers\.npy"),
    "audit": re.compile(HEADS + r"|audit\.(parquet|html)|records\.(jsonl|parquet)"),
}
UNITS = re.compile(
    HEADS + r"|[a-z]+(-\d+)+\.safetensors|sum(-\d+-of-\d+)?\.safetensors|(scores|layers)\.npy"
)  # of all other stages
PLACED = re.compile(r"(correction|diagonal)/(lam\.safetensors|\.division\.json)")
SUFFIXES = (".json", ".safetensors", ".parquet", ".npy", ".html", ".jsonl", ".csv")  # of what is written
Ours = Callable[[Path], bool]


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
    def open(
        cls, path: Path, name: str, key: dict[str, Any], overwrite: bool = False, ours: Ours | None = None
    ) -> "Artifact":
        """Open ``path`` for the stage ``name`` made from ``key``; ``overwrite`` replaces what is done or made from another key.

        Args:
            ours: whether a file that no artifact lists was written by this program all the same, and may go too.

        Raises:
            MismatchError: the folder holds the result of another key, or something that is not ours.
            ConfigError: the folder cannot be written.
            StorageError: what it holds is damaged.
        """
        head = {"stage": name, "schema": SCHEMA}  # first: the first difference is the one that is named
        stage = cls(path, json.loads(json.dumps(head | key | head)))
        dist.on_first(lambda: stage._make_ready(overwrite, ours))
        if read_json(path / "key.json") != stage.key:  # a process that was started with something else
            stage._refuse(read_json(path / "key.json"))
        return stage

    def _make_ready(self, overwrite: bool, ours: Ours | None) -> None:
        file = self.path / "key.json"
        if file.exists():
            found = load_json(file)
            if not _is_key(found):
                self._refuse_foreign("key.json")
            if found["schema"] == SCHEMA:
                found = read_json(file)
            if found == self.key and not (overwrite and self.done):
                if self.done:
                    for name in self.manifest["files"]:
                        if not name.endswith(".safetensors"):  # factors are large, and verified when they are read
                            check(self.path / name)
                return
            same_kind = found["stage"] == self.key["stage"]
            if found != self.key and _holds_work(self.path) and not (overwrite and same_kind):
                self._refuse(found)
            discard(self.path, ours, refuse=True)
        self._claim()

    def _claim(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        except OSError as error:
            raise storage_error(self.path, error) from error
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
        choice = {
            "stage": "choose another folder",
            "schema": "choose another folder, or add --overwrite to replace what another version wrote",
        }.get(name, "choose another folder, go back to the earlier value, or add --overwrite to replace it")
        raise MismatchError(f"{self.path} was made with another {name}: got {new!r} now, {old!r} then; {choice}")

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    @property
    def manifest(self) -> dict[str, Any]:
        """What the stage has measured.

        Raises:
            StorageError: it is damaged.
        """
        kind = MANIFESTS.get(self.key["stage"], Manifest)
        foreign = f"not the manifest of a {self.key['stage']}: got {self.path}; {ADVICE}"
        return read_head(self.path / "manifest.json", kind, foreign)

    def finish(self, info: dict[str, Any], *inner: str) -> None:
        """Mark the stage done: from now on it is only read.

        Args:
            inner: patterns of files in folders below, such as ``eigen/*``, that stay a part of it beside those in its own.
        """
        own = NAMED.get(self.key["stage"], UNITS)
        found = {p for p in self.path.glob("*") if own.fullmatch(p.name) and not re.fullmatch(HEADS, p.name)}
        found |= {p for pattern in inner for p in self.path.glob(pattern) if p.suffix != ".json" and _is_sealed(p)}
        files = {p.relative_to(self.path).as_posix(): checksum(p) for p in sorted(found)}
        write_json(self.path / "manifest.json", {"key": self.key, **info, "files": files})

    def unit_path(self, unit: int, suffix: str = "safetensors") -> Path:
        return self.path / f"unit-{unit:06d}.{suffix}"

    def has(self, unit: int) -> bool:
        return self.unit_path(unit).exists()

    def commit(self, unit: int, tensors: Tensors) -> None:
        write_tensors(self.unit_path(unit), tensors)

    def read(self, unit: int) -> Tensors:
        return read_tensors(self.unit_path(unit))


def _is_key(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("stage"), str) and "schema" in found


def _is_ours(path: Path, head: str = "key.json") -> bool:
    """Whether a folder holds a key of a stage, rather than somebody's file of that name."""
    try:
        return (path / head).exists() and _is_key(load_json(path / head))
    except (OSError, StorageError):
        return False


def _holds_work(path: Path) -> bool:
    """Whether anything was finished here: a folder of keys alone has nothing to lose and may change its owner."""
    files = (p.name for p in path.rglob("*") if p.is_file())
    return any(name != "key.json" and not name.startswith(".") for name in files)


# ---- what is ours


def files_of(path: Path, ours: Ours | None = None) -> tuple[list[Path], list[Path]]:
    """The files below a folder of ours that this program wrote, and those that it did not.

    Hidden files that are not ours are in neither list: they are left where they are, and nobody minds them.
    """
    try:
        listed = set(read_json(path / "manifest.json")["files"])
    except (StorageError, LookupError, TypeError):  # it is not there, or damaged
        listed = set()
    written, foreign = [], []
    for place, folders, names in os.walk(path):
        folder = Path(place)
        if folder != path and ".lock" in names:  # an artifact of its own
            folders.clear()
            foreign.append(folder)
            continue
        foreign += [folder / name for name in folders if (folder / name).is_symlink()]
        own = NAMED.get(load_json(folder / "key.json")["stage"], UNITS) if _is_ours(folder) else None
        for file in (folder / name for name in names):
            below = file.relative_to(path).as_posix()
            known = below in listed or PLACED.fullmatch(below) or _is_temporary(file.name)
            known = known or (own and own.fullmatch(file.name))
            if not file.is_symlink() and (known or _is_sealed(file) or (ours and ours(file))):
                written.append(file)
            elif not file.name.startswith("."):
                foreign.append(file)
    return written, foreign


def _is_temporary(name: str) -> bool:
    """Whether a file was left half-written by a process that has ended."""
    found = TEMPORARY.fullmatch(name)
    return bool(found) and found[1].endswith(SUFFIXES) and abandoned(name)


def _is_sealed(file: Path) -> bool:
    try:
        if file.suffix == ".safetensors":
            return sealed(file) is not None
        return file.suffix == ".json" and isinstance(read_json(file), dict)
    except (OSError, ValueError, StorageError):
        return False


def discard(path: Path, ours: Ours | None = None, refuse: bool = False) -> None:
    """Remove what this program wrote in a folder, and the folders that are empty then; a lock that is held stays.

    Killed on the way it leaves a folder that is not done, and that is still ours: the manifest goes first, the key last.

    Args:
        refuse: do nothing where there is anything else; otherwise that is left in its place.

    Raises:
        MismatchError: there is something else.
    """
    written, foreign = files_of(path, ours)
    if refuse and foreign:
        raise MismatchError(
            f"{path} holds what this program did not write, so it is not replaced: got {foreign[0]}; move it away, "
            "or choose another folder"
        )
    first, last = path / "manifest.json", path / "key.json"
    for file in sorted(written, key=lambda p: (p != first, -len(p.parts), p.name == "key.json", p.name)):
        if file != last:
            file.unlink(missing_ok=True)
    inner = [folder for folder, _, _ in os.walk(path, topdown=False)]
    for folder in inner[:-1]:
        with suppress(OSError):  # it holds something else
            os.rmdir(folder)
    with suppress(OSError):
        last.unlink(missing_ok=True)
        path.rmdir()


# ---- one run at a time


def refuse_inside(path: Path) -> None:
    """Refuse a place for output that lies in somebody's artifact.

    Raises:
        ConfigError: it does.
    """
    with suppress(OSError, ValueError):  # what can be no path is told when it is written to
        for folder in path.resolve().parents:
            if _is_ours(folder) or _is_ours(folder, "info.json"):
                raise ConfigError(
                    f"the output would lie inside another artifact: got {path}, which is in {folder}; "
                    "choose a folder outside of it"
                )


_HELD: set[Path] = set()  # folders that this process fills now


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` for this run: two runs that fill one folder at the same time would spoil each other's work."""
    if _HELD.intersection(path.resolve().parents):  # it is a part of what this run fills
        yield
        return
    if os.fsencode(path).decode(errors="replace") != str(path):
        raise ConfigError(
            f"the folder's name is not UTF-8, which its files could not be read by: got {str(path)!r}; choose another"
        )
    with ExitStack() as held:
        dist.on_first(lambda: held.enter_context(_locked(path)))
        _HELD.add(path.resolve())
        held.callback(_HELD.discard, path.resolve())
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    refuse_inside(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        there = (path / ".lock").exists()
        lock = open(plain(path / ".lock"), "a")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise storage_error(path, error) from error
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
            for file in files_of(path)[0]:
                if _is_temporary(file.name):
                    file.unlink(missing_ok=True)
        try:
            yield
        finally:
            if not there and not _is_ours(path):  # a folder that was refused is left as it was
                (path / ".lock").unlink(missing_ok=True)


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
