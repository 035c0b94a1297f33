"""Files become rows here: JSON lines, Parquet, CSV and text, alone or in a folder, compressed or not, and `datasets` data.

A row is a dictionary, or a sentence that says why it is none; where a whole file cannot be read on, an error is raised.
Rows are counted from 1; of the forms made of lines the number is that of the line.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upriver.errors import CorpusError, InputError
from upriver.runtime.artifact import digest, file_digest, plain, strange
from upriver.text.arrays import NotOneError, record_rows
from upriver.text.folders import about_files, one_split
from upriver.text.lines import COMPRESSIONS, LARGEST, TOO_LARGE, LongLine, damaged, not_utf8, read_chunks, read_lines
from upriver.text.shards import UNTOLD, Shard, token_rows
from upriver.text.tables import Row, csv_rows, parquet_rows

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".txt": "text", ".text": "text", ".md": "text", ".bin": "tokens", ".npy": "tokens",
}  # fmt: skip
KNOWN = (
    "use .jsonl, .json, .parquet, .csv, .tsv or .txt (also as .gz, .xz, .bz2, .zst, but Parquet), .bin, .npy, or a folder of "
    "such files"
)
ErrorType = type[InputError]


@dataclass
class Source:
    """A source is one file, or one `datasets` data set, that rows are read from."""

    path: Path
    name: str  # as in the folder that was given; the default id of its documents
    kind: str  # jsonl, parquet, csv, text, tokens, dataset
    compression: str = ""
    data: Any = None  # the data set
    read_bytes: int = 0  # of `size`, so far
    shard: Shard = UNTOLD
    split: str | None = None  # field of a JSON object that holds several lists of records
    separator: str = ""  # of the cells of a CSV file, once it was read
    read_digest: str = ""  # of the content of a file of lines, hashed as it was read to its end

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.data is None else len(self.data)

    @property
    def fingerprint(self) -> list[str]:
        """Return its name and a hash of its content.

        Raises:
            CorpusError: a file cannot be read.
        """
        try:
            hashes = [file_digest(file) for file in self.files]
        except OSError as reason:
            raise CorpusError(f"{self.path}: {damaged(reason)}") from reason
        return [self.name, *hashes] if self.data is None else [self.name, *hashes, digest(self.form)]

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.data is None else [Path(file["filename"]) for file in self.data.cache_files]

    @property
    def written(self) -> list[tuple[int, int, int]]:
        """Which files these are, and when each was last written to."""
        try:
            return [(at.st_ino, at.st_size, at.st_mtime_ns) for at in map(os.stat, self.files)]
        except OSError:  # told when it is hashed
            return []

    def check_read(self, fingerprint: list[str], written: list[tuple[int, int, int]]) -> None:
        """Compare what was read with what was hashed before that: the bytes themselves, or else the files before and after.

        Raises:
            CorpusError: they differ.
        """
        same = [self.name, self.read_digest] == fingerprint
        if not same and (self.read_digest or self.written != written or self.fingerprint != fingerprint):
            raise CorpusError(
                f"the corpus changed while it was read: got {self.path}; "
                "give the same command again when nothing writes to it any more"
            )

    @property
    def form(self) -> list[Any]:
        """Return what the files of a data set do not say: a selection of rows, and the columns."""
        indices = self.data._indices
        picked = None if indices is None else [int(i) for i in indices.column(0).to_pylist()]
        in_memory = None if self.data.cache_files else self.data._fingerprint
        return [picked, self.data.column_names, in_memory]


def find_sources(
    path: Path,
    error: ErrorType = CorpusError,
    skip: Callable[[str, str], None] | None = None,
    split: str | None = None,
    about: list[str] | None = None,
) -> list[Source]:
    """Find the files at ``path``, in the order in which they are read (sorted by name); links are followed.

    ``skip(where, reason)`` is told of files in a folder that are of no known type; without it they are an error.
    Files about the data, such as a README, are left out where a list for their names is given; ``split`` is of `datasets`.

    Raises:
        error: nothing that can be read, or something of which it cannot be known what it holds.
    """
    mode = _mode(path, error)
    if not mode or any(_mode(path / name, error) for name in ("dataset_info.json", "dataset_dict.json")):
        return [_dataset(path, bool(mode), error, split)]
    sources, files = [], sorted(files_below(path, error)) if stat.S_ISDIR(mode) else [path]
    if about is not None and files != [path]:
        known = {file: (kind_of(file) or ("",))[0] for file in files}
        texts, records = ([f for f in files if known[f] and (known[f] == "text") == text] for text in (True, False))
        left = about_files(path, files, texts, records)
        files = [file for file in files if file not in left]
        about += [file.relative_to(path).as_posix() for file in left]
    for file in files:
        if what := strange(file):
            reason = f"{what} and no file; write what comes out of it to a file, and give that"
            if skip is None or file == path:
                raise error(f"cannot be read: got {file}, {reason}")
            skip(str(file), reason)
        elif (kind := kind_of(file)) is not None:
            name = file.name if file == path else file.relative_to(path).as_posix()
            name = name.encode(errors="backslashreplace").decode()  # a name need not be UTF-8
            sources.append(Source(file, name, *kind))
        elif skip is None or file == path:
            raise error(f"not a known type of file: got {file}; {KNOWN}")
        else:
            skip(str(file), f"not a known type of file; {KNOWN}")
    if not sources:
        raise error(f"the folder holds no file that can be read: got {path}; {KNOWN}")
    return sources


def _mode(path: Path, error: ErrorType) -> int:
    """Tell what stands at ``path``, as `os.stat` does; 0 means nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no file can have such a name
        return 0
    except OSError as reason:
        what = f"not a path that can be opened: got {str(path)!r:.200} ({reason.strerror})"
        raise error(f"{what}; give the path of a file or folder that you may read") from reason


def files_below(folder: Path, error: ErrorType, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """List the files below a folder but hidden ones; a link into the corpus, or to a folder ``above``, holds nothing new."""
    above = (*above, os.path.realpath(folder))
    try:
        paths = list(folder.iterdir())
    except OSError as reason:
        what = f"the folder cannot be listed: got {folder} ({reason.strerror})"
        raise error(f"{what}; change its permissions, or move it away") from reason
    for path in paths:
        if path.name.startswith("."):
            continue
        mode = _mode(path, error)
        if not mode:
            raise error(f"a link that leads nowhere: got {path}; mend or remove it")
        if not stat.S_ISDIR(mode):
            yield path
        elif not _read_anyway(path, above):
            yield from files_below(path, error, above)


def _read_anyway(folder: Path, above: tuple[str, ...]) -> bool:
    """Tell whether a folder is one of those ``above`` it, or a link to one that the first of them, the corpus, holds openly."""
    target = Path(os.path.realpath(folder))
    if str(target) in above:
        return True
    inside = folder.is_symlink() and target.is_relative_to(above[0])
    return inside and not any(part.startswith(".") for part in target.relative_to(above[0]).parts)


def kind_of(path: Path) -> tuple[str, str] | None:
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return None if kind is None or (kind in ("parquet", "tokens") and compression) else (kind, compression)


def _dataset(path: Path, saved: bool, error: ErrorType, split: str | None) -> Source:
    """Load the `datasets` data set that was saved in a folder, or that the hub has by that name."""
    missing = f"no such file or folder: got {path}"
    if not saved and (path.is_absolute() or kind_of(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))):
        raise error(f"{missing}; check the path")
    import datasets

    try:
        for file in files_below(path, error) if saved else ():
            plain(file)
        data: Any = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as reason:
        what = f"cannot read the data set saved in {path}: {reason}; save it again with save_to_disk"
        raise error(what if saved else f"{missing}, nor can a data set of that name be loaded ({reason})") from reason
    return Source(path, path.name, "dataset", data=one_split(data, split, error))


def rows(source: Source) -> Iterator[tuple[int, Row]]:
    """Read all rows of a source, with their numbers.

    Raises:
        CorpusError: the file is damaged or cut short.
    """
    readers = {"jsonl": _json_rows, "tokens": token_rows, "csv": _csv_rows, "text": _text_rows, "parquet": parquet_rows}
    if source.data is None:
        yield from readers[source.kind](source)
    for row, value in enumerate(source.data or (), 1):
        source.read_bytes = row
        yield row, value


def _json_rows(source: Source) -> Iterator[tuple[int, Row]]:
    """One object a line; a ``.json`` file may also be an array, or one object."""
    if ".json" in [suffix.lower() for suffix in source.path.suffixes[-2:]]:
        with suppress(NotOneError):
            yield from record_rows(source.path, read_chunks(source), source.split)
            return
    yield from json_rows(source)


def json_rows(source: Source, error: ErrorType = CorpusError) -> Iterator[tuple[int, Row]]:
    for line, content in read_lines(source, error):
        if isinstance(content, LongLine):
            yield line, TOO_LARGE
        elif content.strip():
            yield line, _json_row(content)


def _json_row(content: bytes) -> Row:
    try:
        row = json.loads(content.decode(), parse_constant=lambda _: None, object_pairs_hook=_once)
    except _TwiceError as reason:
        return f"a JSON object has the field {reason.args[0]!r} twice; which of the two is meant cannot be known, leave one out"
    except UnicodeDecodeError as reason:
        return not_utf8(content[reason.start], f"byte {reason.start + 1} of the line")
    except (ValueError, RecursionError) as reason:
        if content.lstrip().startswith(b"["):
            return "a JSON array that goes over several lines; name the file .json, or write one JSON object a line"
        return f"broken JSON: {reason}; write one JSON object a line"
    if isinstance(row, dict):
        return row
    text = repr(row)
    return f"not a JSON object: got {text if len(text) <= 60 else text[:57] + '...'}; write one JSON object a line"


class _TwiceError(Exception):
    """A field stands twice in an object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _csv_rows(source: Source) -> Iterator[tuple[int, Row]]:
    tab = ".tsv" in [suffix.lower() for suffix in source.path.suffixes]
    return csv_rows(source, "\t" if tab else "")


def _text_rows(source: Source) -> Iterator[tuple[int, Row]]:
    content = bytearray()
    for _, line in read_lines(source):
        if isinstance(line, LongLine) or len(content) + len(line) > LARGEST:
            yield 1, TOO_LARGE
            return
        content += line
    try:
        yield 1, {"id": source.name, "text": content.decode()}
    except UnicodeDecodeError as reason:
        start = content.rfind(b"\n", 0, reason.start) + 1
        line = content.count(b"\n", 0, reason.start) + 1
        yield line, not_utf8(content[reason.start], f"byte {reason.start - start + 1} of the line")
