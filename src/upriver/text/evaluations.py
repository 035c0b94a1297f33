"""Logs of an evaluation become questions here: why did the model give the answers that failed?

Read are the ``.json`` and ``.eval`` logs of inspect (the latter a zip with a file for each sample), what the evaluation
harness of EleutherAI writes with ``--log_samples``, and folders of such logs.  A sample has an input as the model was given
it, the model's answer, the right one (the target) where there is one, and a score.
"""

import dataclasses
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from upriver.errors import ConfigError, QueryError
from upriver.text.lines import UNREADABLE, read_chunks
from upriver.text.sources import Source, files_below, json_rows, kind_of

LARGEST = 64 << 20  # bytes of a log in one JSON object, or of one sample in a zip
VERSIONS = (1, 2)  # of inspect's logs
DAMAGED = (*UNREADABLE, zipfile.BadZipFile, struct.error, NotImplementedError)
ZSTANDARD = 93  # as zip numbers its compressions
BESIDE = re.compile(r"results_.*\.json|logs\.json|listing\.json|eval-set\.json")  # what they write beside their logs
HARNESS = {"doc_id", "doc", "arguments", "resps", "filtered_resps"}
WORDS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "TRUE": 1.0, "YES": 1.0, "FALSE": 0.0, "NO": 0.0}
Fields = dict[str, Any]


@dataclass
class Asking:
    """Which samples of a log become questions, and about which answer; ``notes`` say what was left out."""

    samples: str | None = None  # failed (None: these), passed or all; "failed:NAME" by the score of that name
    right: bool = False  # the target against the model's answer, instead of the model's answer against the target
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.which not in ("failed", "passed", "all"):
            what = f"bad value for --samples: got {self.samples!r}"
            raise ConfigError(f"{what}; failed, passed or all, or failed:SCORE for a score by its name")

    @property
    def which(self) -> str:
        return (self.samples or "failed").partition(":")[0]

    @property
    def score(self) -> str | None:
        return (self.samples or "").partition(":")[2] or None


class Sample(NamedTuple):
    """One sample of a log."""

    where: str
    task: str
    id: str
    prompt: str | list[Fields]  # a text, or the messages of a chat
    answer: str | Fields  # the text that the model gave, or its message
    targets: list[str]
    score: str
    value: Any
    more: Fields  # further labels


Log = tuple[str, Iterator[Sample]]  # its task, and its samples, which are read as they are asked for


def questions(path: Path, asking: Asking) -> Iterator[tuple[str, Fields]] | None:
    """Return where each sample stands and the fields of its question; None where ``path`` is no log of an evaluation.

    Of a folder the logs are read in the order of their names.  A question is named by its task, and by its file instead where
    several logs are of one task.

    Raises:
        QueryError: a log is damaged, or of an unknown version; none of its samples is asked for; a folder holds other files too.
        ConfigError: samples are chosen of what is no log.
    """
    files = sorted(files_below(path, QueryError)) if _is(path, Path.is_dir) else [path]
    files = [x for x in files if x == path or not BESIDE.fullmatch(x.name)]
    tasks = [log and log[0] for log in (_log(file, asking) for file in files)]
    if all(task is None for task in tasks):
        if asking.samples:
            what = f"samples are chosen of the log of an evaluation: got {path}, which is none"
            raise ConfigError(f"{what}; leave out --samples")
        return None
    if None in tasks:
        other = files[tasks.index(None)]
        raise QueryError(f"{path}: a folder of logs of evaluations holds another file: got {other}; move it away")
    names = [
        str(task) if tasks.count(task) == 1 else file.relative_to(path).as_posix()
        for task, file in zip(tasks, files, strict=True)
    ]
    found = ((name, x) for name, file in zip(names, files, strict=True) if (log := _log(file, asking)) for x in log[1])
    return _chosen(path, found, asking)


def _log(path: Path, asking: Asking) -> Log | None:
    if not _is(path, Path.is_file):
        return None
    if path.suffix == ".eval":
        return _zipped(path, asking)
    source = Source(path, path.name, *(kind_of(path) or ("", "")))
    return (_listed(source, asking) or _harness(source, asking)) if source.kind == "jsonl" else None


def _is(path: Path, what: Callable[[Path], bool]) -> bool:
    """Whether a file or a folder stands there; what may not be looked at is told by who reads it."""
    try:
        return what(path)
    except OSError:
        return False


def _chosen(path: Path, samples: Iterable[tuple[str, Sample]], asking: Asking) -> Iterator[tuple[str, Fields]]:
    counts = {"failed": 0, "passed": 0, "neither": 0}
    left: dict[str, int] = {}
    for name, x in samples:
        value = _number(x.value)
        kind = "neither" if value is None or value == 0.5 else "failed" if value < 0.5 else "passed"
        counts[kind] += 1
        if asking.which not in ("all", kind):
            continue
        if reason := _unusable(x, asking.right):
            left[reason] = left.get(reason, 0) + 1
            continue
        yield x.where, _fields(x, asking.right) | {"id": f"{name}/{x.id}"}
    asking.notes += [f"{count} samples of {path.name} were left out: {reason}" for reason, count in left.items()]
    wanted = sum(counts.values()) if asking.which == "all" else counts[asking.which]
    if not wanted or wanted == sum(left.values()):
        told = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        why = f" ({'; '.join(left)})" if left else ""
        raise QueryError(
            f"{path}: no sample of the log becomes a question: got {told} by its score{why}; choose others with --samples "
            "(failed, passed or all, failed:SCORE for a score by its name)"
        )


def _unusable(x: Sample, right: bool) -> str:
    text = x.answer if isinstance(x.answer, str) else x.answer.get("content") or x.answer.get("tool_calls")
    if right and not x.targets:
        return "they have no target"
    return "" if text or right else "the model gave no answer"


def _fields(x: Sample, right: bool) -> Fields:
    """The fields of a question: the answer that the model gave, against the target where it failed."""
    failed = (_number(x.value) or 0.0) < 0.5
    labels = {"task": x.task, "sample": x.id, "score": x.score, "value": x.value, **x.more}
    text = x.answer if isinstance(x.answer, str) else x.answer.get("content") or ""
    wrong = [x.answer] if isinstance(x.answer, str) else [[x.answer]]
    targets = [target for target in x.targets if failed and target.strip() != text.strip()]
    others: list[Any] = targets if isinstance(x.answer, str) else [[x.answer | {"content": t}] for t in targets]
    if right:
        given = x.targets[0] if isinstance(x.answer, str) else [{"role": "assistant", "content": x.targets[0]}]
        asked, against = given, wrong if failed and text.strip() not in ("", x.targets[0].strip()) else []
    else:
        asked, against = wrong[0], others
    head = {"prompt": x.prompt, "completion": asked}
    return head | ({"contrast": against} if against else {}) | labels


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = WORDS.get(value.strip().upper(), value)
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if found == found else None


# ---- inspect


def _listed(source: Source, asking: Asking) -> Log | None:
    path = source.path
    if ".json" not in [x.lower() for x in path.suffixes[-2:]]:
        return None
    content = bytearray()
    for chunk in read_chunks(source, QueryError):
        content += chunk
        if content[:256].lstrip()[:1] != b"{":
            return None
        if len(content) > LARGEST:
            what = f"{path}: a log in one JSON object is too large: got more than {LARGEST >> 20} MB"
            raise QueryError(
                f"{what}; give the .eval form, whose samples are read one by one (inspect log convert --to eval)"
            )
    try:
        log = json.loads(content)
    except (ValueError, RecursionError):  # JSON lines, or a broken file: their reader says which
        return None
    if not isinstance(log, dict) or "eval" not in log or "version" not in log:
        return None
    task, samples = _task(path, log), log.get("samples") or []
    if not isinstance(samples, list):
        raise QueryError(f"{path}: the log is damaged: its samples are no list; write it again")
    found = (_of_inspect(sample, f"{path}: sample {n}", task, asking) for n, sample in enumerate(samples, 1))
    return task, chain.from_iterable(found)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as log:
            yield log
    except DAMAGED as reason:
        what = f"{path}: the log cannot be read: {' '.join(str(reason).split())}"
        raise QueryError(f"{what}; it is damaged or cut short, make it again") from reason


def _zipped(path: Path, asking: Asking) -> Log:
    with _opened(path) as log:
        members = {x.filename: x for x in log.infolist()}
        head = members.get("header.json") or members.get("_journal/start.json")
        if head is None:
            raise QueryError(f"{path}: no log of inspect: it holds no header.json; give a log that inspect wrote")
        task = _task(path, _json(path, log, head))

    def found() -> Iterator[Sample]:
        with _opened(path) as log:
            for name, member in members.items():
                if name.startswith("samples/") and name.endswith(".json"):
                    yield from _of_inspect(_json(path, log, member), f"{path}: {name}", task, asking)

    return task, found()


def _json(path: Path, log: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """One file of a zip, also where it is compressed as zipfile does not know it."""
    where = f"{path}: {member.filename}"
    if member.compress_type != ZSTANDARD:
        with log.open(member) as file:
            content = file.read(LARGEST + 1)
    else:
        with open(path, "rb") as raw:
            raw.seek(member.header_offset)
            raw.seek(sum(struct.unpack("<HH", raw.read(30)[26:])), 1)
            packed = raw.read(member.compress_size)
        content = pa.input_stream(io.BytesIO(packed), compression="zstd").read(LARGEST + 1)  # pyright: ignore
        if len(content) <= LARGEST and zlib.crc32(content) != member.CRC:
            raise zipfile.BadZipFile(f"bad checksum of {member.filename}")
    if len(content) > LARGEST:
        raise QueryError(f"{where}: a sample is too large: got more than {LARGEST >> 20} MB; leave it out of the log")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as reason:
        raise QueryError(f"{where}: broken JSON: {reason}; it is damaged, make the log again") from reason


def _task(path: Path, log: Any) -> str:
    spec = log.get("eval") if isinstance(log, dict) else None
    if not isinstance(spec, dict) or log.get("version") not in VERSIONS:
        version = log.get("version") if isinstance(log, dict) else None
        what = f"{path}: a log of an unknown version: got {version!r}"
        raise QueryError(f"{what}; versions {', '.join(map(str, VERSIONS))} of inspect are read")
    return str(spec.get("task") or path.stem).rsplit("/", 1)[-1]


def _of_inspect(sample: Any, where: str, task: str, asking: Asking) -> Iterator[Sample]:
    if not isinstance(sample, dict) or "id" not in sample or not {"messages", "input"} & sample.keys():
        raise QueryError(f"{where}: no sample of inspect: it has no id or no input; make the log again")
    if sample.get("error"):
        return  # it was not answered
    try:
        found, scores = _attached(sample), sample.get("scores") or {k: sample[k] for k in ["score"] if sample.get(k)}
        name = asking.score or next(iter(scores), "")
        if name not in scores:
            known = ", ".join(scores) or "none"
            raise QueryError(f"{where}: the sample has no such score: got {name or 'no score'!r}; it has {known}")
        messages = [_message(x) for x in found.get("messages") or []]
        last = max((i for i, x in enumerate(messages) if x["role"] == "assistant"), default=None)
        if last is None:  # the conversation was not kept
            given = found["input"]
            messages = [{"role": "user", "content": given}] if isinstance(given, str) else [_message(x) for x in given]
            last = len(messages)
            messages.append({"role": "assistant", "content": (found.get("output") or {}).get("completion") or ""})
        value, extracted = scores[name]["value"], scores[name].get("answer")
        target = found.get("target") or ""
        targets = [x for x in (target if isinstance(target, list) else [target]) if str(x).strip()]
    except (KeyError, TypeError, AttributeError, IndexError) as reason:
        raise QueryError(
            f"{where}: not a sample as inspect writes them ({reason!r:.80}); make the log again"
        ) from reason
    answer, epoch = messages[last], sample.get("epoch") or 1
    targets = [_in_place(answer.get("content") or "", extracted, str(x), str(x)) for x in targets]
    more = {name: sample[name] for name in ("metadata",) if sample.get(name)} | ({"epoch": epoch} if epoch > 1 else {})
    id = f"{sample['id']}" + (f"#{epoch}" if epoch > 1 else "")
    yield Sample(where, task, id, messages[:last], answer, targets, name, value, more)


def _in_place(text: str, extracted: Any, target: str, alone: str) -> str:
    """The model's text with the target where the scorer found the answer, so that the two differ in nothing else."""
    found = list(re.finditer(rf"(?<!\w){re.escape(str(extracted))}(?!\w)", text)) if extracted else []
    return text[: found[-1].start()] + target + text[found[-1].end() :] if found else alone


def _attached(sample: Fields) -> Fields:
    """The sample with the texts that were set apart put back."""
    apart = sample.get("attachments") or {}

    def back(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("attachment://"):
            return apart.get(value.removeprefix("attachment://"), value)
        if isinstance(value, dict):
            return {name: back(x) for name, x in value.items()}
        return [back(x) for x in value] if isinstance(value, list) else value

    return {name: back(sample.get(name)) for name in ("messages", "input", "output", "target")} if apart else sample


def _message(message: Fields) -> Fields:
    """A message of inspect as chat templates take them."""
    content, thought = message["content"], ""
    if isinstance(content, list):
        thought = "\n".join(x["reasoning"] for x in content if x["type"] == "reasoning")
        content = "\n".join(x["text"] for x in content if x["type"] == "text")
    calls = [
        {"id": x.get("id"), "type": "function", "function": {"name": x["function"], "arguments": x["arguments"]}}
        for x in message.get("tool_calls") or []
    ]
    more = {"reasoning_content": thought} if thought else {}
    more |= {"tool_calls": calls} if calls else {}
    more |= {name: message[name] for name in ("tool_call_id",) if message.get(name)}
    return {"role": message["role"], "content": content, **more}


# ---- the evaluation harness


def _harness(source: Source, asking: Asking) -> Log | None:
    path, first = source.path, next((row for _, row in json_rows(source, QueryError)), None)
    if not isinstance(first, dict) or not first.keys() >= HARNESS:
        return None
    named = re.fullmatch(r"samples_(.+?)(_\d{4}-\d\d-\d\dT.*)?", path.name.split(".json")[0])
    task, kept = named[1] if named else path.stem, first.get("filter")

    def found() -> Iterator[Sample]:
        for line, row in json_rows(dataclasses.replace(source), QueryError):
            where = f"{path}:{line}"
            if isinstance(row, str):
                raise QueryError(f"{where}: {row}")
            if row.get("filter") != kept:  # the same sample, its answer cut out in another way
                continue
            try:
                yield _of_harness(row, where, task, asking)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as reason:
                what = f"{where}: not a sample as the evaluation harness writes them ({reason!r:.80})"
                raise QueryError(f"{what}; write the log again with --log_samples") from reason

    return task, found()


def _of_harness(row: Fields, where: str, task: str, asking: Asking) -> Sample:
    name = asking.score or next(iter(row.get("metrics") or [x for x in ("acc", "exact_match") if x in row]), "")
    if name not in row:
        known = ", ".join(map(str, row.get("metrics") or ())) or "none"
        raise QueryError(f"{where}: the sample has no such score: got {name or 'no score'!r}; it has {known}")
    requests = row["arguments"]
    if isinstance(requests, dict):
        requests = [[x[f"arg_{i}"] for i in range(len(x))] for x in requests.values()]
    target, answers = str(row["target"]), row["filtered_resps"]
    more = {"filter": row["filter"]} if row.get("filter") not in (None, "none") else {}
    if isinstance(requests[0][1], str):  # the answer was chosen among several by its log-probability
        found = [float(x[0] if isinstance(x, list) else x) for x in answers][: len(requests)]
        lengths = [len(x[1].lstrip()) or 1 for x in requests] if name == "acc_norm" else [1] * len(found)
        best = max(range(len(found)), key=lambda i: found[i] / lengths[i])
        prompt, answer = requests[best][:2]
        right = _right(requests, target, best, _number(row[name]))
        same = right is not None and requests[right][0] == prompt
        targets = [requests[right][1]] if same and right is not None else []
        return Sample(where, task, str(row["doc_id"]), prompt, answer, targets, name, row[name], more)
    answer = row["resps"][0]
    while isinstance(answer, list):
        answer = answer[0]
    text, extracted = str(answer), answers[0] if isinstance(answers[0], str) else ""
    right = text[: len(text) - len(text.lstrip())] + target.strip()
    if len(extracted.split()) == len(target.split()) == 1:
        right = _in_place(text, extracted.strip(), target.strip(), right)
    targets = [right] if target.strip() else []
    return Sample(where, task, str(row["doc_id"]), requests[0][0], text, targets, name, row[name], more)


def _right(requests: list[Any], target: str, chosen: int, value: float | None) -> int | None:
    """Which of the choices is the target, which the log holds as its number or its text."""
    meant = [i for i, x in enumerate(requests) if x[1].strip() == target.strip()]
    meant += [int(target)] if target.isdecimal() and int(target) < len(requests) else []
    fitting = [i for i in meant if value is None or (i == chosen) == (value > 0.5)]
    return next(iter(fitting or meant), None)
