"""The report of a trace is one page that opens from disk and loads nothing, and its content as JSON, JSONL and CSV."""

import csv
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from upriver.errors import ConfigError
from upriver.runtime.artifact import atomic, plain
from upriver.show.data import report_head, report_queries, report_trust, shown_nats
from upriver.show.folder import Folder, Json, read_folder
from upriver.show.groups import by_group, is_groups, read_groups
from upriver.show.page import block, listed, render

QUANTISE_ABOVE = 200_000  # tokens of the passages: above it their scores are stored in 8 bits
WHOLE_BELOW = 400_000  # tokens that report.json holds
EXCERPT = 200  # characters of a passage that it does not hold token by token
WARN_ABOVE = 5_000_000  # bytes of the page
HEAD = 65_536  # bytes that are looked at of a file that would be replaced
CSV_COLUMNS = (
    "query", "side", "rank", "sequence", "document", "start", "end", "score", "score_nats", "calibrated_nats",
    "rescored", "spurious", "tfidf_rank", "overlap", "duplicate_of", "metadata", "text",
)  # fmt: skip
OURS = {  # how the files of a report begin
    ".html": re.compile(
        rb'<!doctype html>\n<html lang="en">\n<head>\n(?:<meta name="generator" content="Upriver">\n|<meta charset="utf-8">\n'
        rb'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; script-src \'sha256-)'
    ),
    ".json": re.compile(rb'\{"format": "upriver-report", '),
    ".jsonl": re.compile(rb'\{"example_id": "(?:[^"\\]|\\.)*", "query_set": "upriver", '),
    ".csv": re.compile(
        re.escape(",".join(CSV_COLUMNS)).replace("calibrated_nats,", "(?:calibrated_nats,)?").encode() + rb"\n"
    ),
}


class Content(NamedTuple):
    """What the four files of a report hold, made a question at a time."""

    page: list[str]  # the blocks of the page's questions
    listed: list[Json]  # what the page's list says of them
    facts: list[Json]  # what the trust panel goes by


def write_report(
    scores: Path,
    out: Path | None = None,
    *,
    by: Sequence[str] = (),
    contrast: tuple[str, str] | None = None,
    corpus: str | Path | None = None,
    warn_above: int = WARN_ABOVE,
    quantise_above: int = QUANTISE_ABOVE,
    whole_below: int = WHOLE_BELOW,
) -> Path:
    """Write the report of the folder that ``upriver trace`` made and return the path of its page.

    Args:
        scores: the folder of results.
        out: the folder for ``report.html``, ``report.json``, ``report.jsonl`` and ``top.csv``, or the path of the page
            itself (``X.html``; beside it ``X.json``, ``X.jsonl`` and ``X.top.csv``); the folder of results by default.
        by: fields of the records: the sums over their groups are written into ``scores`` (`by_group`) and shown, as are those
            that are there already.
        contrast: two questions, of which ``by`` sums the difference too.
        corpus: where the records are now, for ``by``; None: where the trace read them.
        warn_above: bytes of the page, above which its size is warned of.
        quantise_above: tokens of the passages shown, above which their scores are stored in 8 bits on the page.
        whole_below: tokens of the passages that ``report.json`` has token by token, the best ones first.

    Raises:
        InputError: ``scores`` is not such a folder, or the trace is not finished.
        ConfigError: the output cannot be written, or would replace a file that no report wrote; a field that makes no groups.

    Example:
        >>> write_report(Path("scores"))
        PosixPath('scores/report.html')
    """
    folder = read_folder(Path(scores))
    files = report_files(Path(out or scores))
    if contrast and not by:
        raise ConfigError(f"a contrast is of groups: got --contrast {' '.join(contrast)} and no --by; give it a field")
    for field in by:
        by_group(folder.path, field, contrasts=[contrast] if contrast else [], corpus=corpus)
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(files[0].parent, error) from error
    tables = read_groups(folder.path, folder.manifest)
    head = report_head(folder, tables)
    quantise, whole_rank = _limits(folder, head["shown_rank"], quantise_above, whole_below)
    head |= {"whole_rank": whole_rank}
    with ExitStack() as written:
        html, *sinks = (written.enter_context(_text_file(path)) for path in files)
        content = _content(report_queries(folder, tables), head, sinks, quantise)
        told = {"trust": report_trust(folder, content.facts)}
        sinks[0].write(json.dumps(told, ensure_ascii=False, allow_nan=False)[1:] + "\n")
        title = " · ".join(filter(None, ["Upriver", head["run"]["model"], head["run"]["corpus"]]))
        page = render(head | told, content.listed, content.page, title, quantise)
        html.write(page)
    if (size := len(page.encode())) > warn_above:
        what = f"the report is large: {files[0]} has {size / 1e6:.1f} MB"
        warnings.warn(f"{what}; trace with a smaller --top for a lighter page", stacklevel=2)
    return files[0]


@contextmanager
def _text_file(path: Path) -> Iterator[TextIO]:
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as sink:
        yield sink


def _limits(folder: Folder, shown: int, quantise_above: int, whole_below: int) -> tuple[bool, int | None]:
    """Whether the page stores token scores in 8 bits; up to which rank ``report.json`` has passages token by token, None: all."""
    if folder.top.count(shown) <= whole_below:
        return folder.top.count(shown) > quantise_above, None
    low, high = 0, shown  # the whole ranks up to the first fit, those up to the second do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if folder.top.count(middle) <= whole_below else (low, middle)
    return folder.top.count(shown) > quantise_above, low


def _content(queries: Iterator[Json], head: Json, sinks: list[TextIO], quantise: bool) -> Content:
    """Write the JSON up to the questions' end, the JSONL and the CSV, and keep what the page needs."""
    plain, lines, table = sinks
    content = Content([], [], [])
    plain.write(json.dumps(head, ensure_ascii=False, allow_nan=False)[:-1] + ', "queries": [')
    table.write(csv_text([]))
    for number, query in enumerate(queries):
        kept = query | {"passages": [_bounded(p, head["whole_rank"]) for p in query["passages"]]}
        plain.write((", " if number else "") + json.dumps(kept, ensure_ascii=False, allow_nan=False))
        lines.write(jsonl_text([query]))
        table.write(csv_text([query]).partition("\n")[2])
        content.page.append(block(query, number, quantise))
        content.listed.append(listed(query))
        facts = [{key: p[key] for key in ("score", "sums", "rescored")} for p in query["passages"]]
        content.facts.append({"solution": query["solution"], "passages": facts})
    plain.write("], ")
    return content


def _bounded(passage: Json, whole_rank: int | None) -> Json:
    """A passage without its lists where there are too many; ``top.parquet`` has them."""
    if whole_rank is None or passage["rank"] <= whole_rank:
        return passage
    lists = ("tokens", "token_scores", "matches", "sentences", "layers")
    return passage | {key: [] for key in lists} | {"text": _cut(passage["text"])}


def _cut(text: str) -> str:
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def report_files(out: Path) -> list[Path]:
    """Name the page, JSON, JSONL and CSV that a report at ``out`` (folder or page) consists of; nothing is written.

    Raises:
        ConfigError: one of them is there and is not of an earlier report, or the place cannot be looked at.
    """
    html = out if out.suffix == ".html" else out / "report.html"
    table = "top.csv" if html.name == "report.html" else f"{html.stem}.top.csv"
    files = [html, html.with_suffix(".json"), html.with_suffix(".jsonl"), html.with_name(table)]
    for file in files:
        try:
            with open(plain(file), "rb") as there:
                head = there.read(HEAD)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unwritable(file, error) from error
        if not OURS[file.suffix].match(head):
            what = f"the report would overwrite a file that no report wrote: got {file}"
            raise ConfigError(f"{what}; choose another place for the report, or move that file away")
    return files


def is_report(file: Path) -> bool:
    """Whether a report wrote a file, as its beginning tells, or it is a table of groups."""
    if file.suffix == ".parquet":
        return file.name.startswith("groups-") and is_groups(file)
    try:
        with open(plain(file), "rb") as there:
            return file.suffix in OURS and bool(OURS[file.suffix].match(there.read(HEAD)))
    except OSError:
        return False


def _unwritable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write the report: got {place} ({error}); choose a folder that you may write to")


def jsonl_text(queries: list[Json]) -> str:
    """Write a line per query in the schema of ``pretraining-tda``, the public viewer of the TrackStar paper (PAIR).

    Scores are in nats where they are known.
    """
    lines = []
    for query in queries:
        line = {
            "example_id": str(query["id"]),
            "query_set": "upriver",
            "inputs_plaintext": query["prompt"] or "",
            "targets_plaintext": query["completion"] or "",
        }
        for side, name in (("positive", "proponent"), ("negative", "opponent")):
            passages = [p for p in query["passages"] if p["side"] == side]
            line[f"{name}s"] = [p["text"] for p in passages]
            line[f"{name}_ids"] = [f"{p['document']}:{p['start']}-{p['end']}" for p in passages]
            line[f"{name}_scores"] = [p["score"] if (x := shown_nats(p)) is None else x for p in passages]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def csv_text(queries: list[Json]) -> str:
    """Write a row per passage and query, without the lists of tokens and layers."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerow(CSV_COLUMNS)
    # quoted, as some versions of Python leave a lone \r bare otherwise
    writer = csv.writer(sink, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for query in queries:
        for passage in query["passages"]:
            metadata = json.dumps(passage["metadata"], ensure_ascii=False)
            row = {**passage, "query": query["id"], "metadata": metadata}
            writer.writerow([row[column] for column in CSV_COLUMNS])
    return sink.getvalue()
