"""Files of bytes become lines here: compressed or not, in any form of Unicode, and never more than 16 MB of a line at once."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from upriver.errors import CorpusError, InputError
from upriver.runtime.artifact import new_digest

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException)
READ = 1 << 20  # bytes that are read at once
LARGEST = 16 << 20  # bytes of one document, and of one line: more than that is never held
WINDOW = 1 << 31  # bytes that a .zst file may refer back, as zstd --long=31 has it
TOO_LARGE = (
    f"the document is too large: got more than {LARGEST >> 20} MB of text; "
    "give it in several records, such as one a line in a .jsonl file"
)
MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class File(Protocol):
    """What is told of a file before it is read, and noted while it is."""

    path: Path
    compression: str  # one of COMPRESSIONS, or nothing
    read_bytes: int  # of the file, so far
    read_digest: str  # of its content, hashed as it was read to its end


@dataclass
class LongLine:
    """A line of more than 16 MB stands for itself by this; once the next line was asked for, it has been skipped."""

    quotes: int  # in it, as far as it was read


def read_lines(source: File, error: type[InputError] = CorpusError) -> Iterator[tuple[int, bytes | LongLine]]:
    """Read the lines of a file in UTF-8, numbered from 1, with what ends them; a mark of its encoding is left out.

    Raises:
        error: the file is damaged or cut short, or in an encoding that it does not tell.
    """
    return _read(source, error, _lines)


def read_chunks(source: File, error: type[InputError] = CorpusError) -> Iterator[bytes]:
    """Read a file in UTF-8, a megabyte or less at once.

    Raises:
        error: as `read_lines`.
    """
    for _, content in _read(source, error, lambda stream: ((0, x) for x in iter(partial(stream.read1, READ), b""))):
        yield content


def _read(source: File, error: type[InputError], pieces: Callable[[Any], Iterator[tuple[int, Any]]]) -> Iterator[Any]:
    line = 0
    try:
        with ExitStack() as opened:
            file = opened.enter_context(open(source.path, "rb", buffering=0))
            raw = opened.enter_context(io.BufferedReader(hashed := _Hashed(file), READ))
            for line, content in pieces(_in_utf8(opened.enter_context(_unfolded(raw, source.compression)))):
                yield line, content
                source.read_bytes = file.tell()
            while raw.read(READ):  # what stands behind the end of what is compressed
                pass
            source.read_digest = hashed.digest.hexdigest()
    except UNREADABLE as reason:
        raise error(f"{source.path}:{line + 1}: {damaged(reason)}") from reason
    except UnicodeError as reason:
        raise error(f"{source.path}:{line + 1}: {reason}; save the file as UTF-8") from reason


def _lines(stream: Any) -> Iterator[tuple[int, bytes | LongLine]]:
    line = 0
    while content := stream.readline(LARGEST + 1):
        line += 1
        if len(content) <= LARGEST:
            yield line, content
        else:
            long = LongLine(content.count(b'"'))
            yield line, long
            while content and not content.endswith(b"\n"):
                content = stream.readline(READ)
                long.quotes += content.count(b'"')


def _unfolded(raw: Any, compression: str) -> io.BufferedReader:
    """The bytes of a file as they were before they were compressed."""
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zstandard}
    return io.BufferedReader(openers[compression](raw), READ) if compression else raw


def _zstandard(raw: Any) -> Any:
    """Arrow takes windows of up to 128 MB; the package ``zstandard``, where it is installed, longer ones."""
    head = raw.peek(6)
    alone, log = head[4:5] and head[4] & 32, 10 + (head[5] >> 3) if len(head) > 5 else 0
    if log > 27 and not alone and find_spec("zstandard"):  # as RFC 8878 has a frame's header
        return _LongWindow(raw)
    return pa.input_stream(raw, compression="zstd")


class _LongWindow(io.RawIOBase):
    """What a .zst file of any window holds; a kilobyte of it may unfold to 43 MB, so no more is given at once."""

    def __init__(self, raw: Any):
        self.raw, self.package, self.left = raw, import_module("zstandard"), b""
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left and (content := self._rest() or self.raw.read(1024)):
            self.frame = self.frame or self.package.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
            try:
                self.left = self.frame.decompress(content)
            except self.package.ZstdError as reason:
                raise OSError(str(reason)) from reason
        if not self.left and self.frame is not None:
            raise EOFError("it ends inside a frame")
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count

    def _rest(self) -> bytes:
        """What stands behind the end of a frame."""
        if self.frame is None or not self.frame.eof:
            return b""
        rest, self.frame = self.frame.unused_data, None
        return rest


def _in_utf8(stream: Any) -> io.BufferedReader:
    """The same text in UTF-8: a file in another form of Unicode says so in its first bytes.

    Raises:
        UnicodeError: it is in such a form and does not say so.
    """
    head = stream.peek(4)
    mark = next((mark for mark in MARKS if head.startswith(mark)), b"")
    if len(mark) and MARKS[mark] != "utf-8":
        return io.BufferedReader(_Recoded(stream, MARKS[mark]), READ)
    stream.read(len(mark))
    zeros = [head[at:1024:4].count(0) for at in range(4)]
    if not mark and head and sum(zeros) >= len(head[:1024]) / 4 and min(zeros) == 0:
        raise UnicodeError("not UTF-8: it looks like UTF-16 or UTF-32 without the mark that would tell")
    return stream


class _Recoded(io.RawIOBase):
    """A stream of text in UTF-16 or UTF-32, read in UTF-8."""

    def __init__(self, stream: Any, encoding: str):
        self.stream, self.decoder, self.left = stream, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        more = True
        while more and not self.left:
            more = self.stream.read(READ)
            self.left = self.decoder.decode(more, final=not more).encode()
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed, as `file_digest` does, when they are read."""

    def __init__(self, file: Any):
        self.file, self.digest = file, new_digest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count


def damaged(reason: BaseException) -> str:
    """Say why a file cannot be read, and what to do about it."""
    if isinstance(reason, PermissionError):
        return "the file may not be read; change its permissions"
    if "too much memory" in str(reason):  # what Arrow says
        return "the file was compressed with a window of more than 128 MB; install what reads it: pip install 'upriver[zstd]'"
    return f"the file cannot be read on: {reason}; it is damaged or cut short, make it again"


def not_utf8(byte: int, place: str) -> str:
    """Say which byte is no UTF-8."""
    return f"not UTF-8: got 0x{byte:02x} at {place}; save the file as UTF-8"
