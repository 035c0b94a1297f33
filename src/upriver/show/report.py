"""The report of a trace is one page that opens from disk and loads nothing, and its content as JSON, JSONL and CSV."""

import base64
import csv
import gzip
import hashlib
import io
import json
import math
import re
import warnings
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from upriver.errors import ConfigError
from upriver.runtime.artifact import atomic, plain
from upriver.show.data import build_report, shown_nats
from upriver.show.folder import Json, read_folder

SCRIPTS = ("charts.js", "detail.js", "viewer.js")
COMPRESS_ABOVE = 300_000  # characters of JSON: above it the data is gzipped
QUANTISE_ABOVE = 3_000_000  # bytes of the page: above it token scores are stored in 8 bits
WARN_ABOVE = 5_000_000  # bytes of the page
DIGITS = 4  # of a token score in the page
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


class Page(NamedTuple):
    html: str
    quantised: bool  # token scores are in 8 bits

    @property
    def size(self) -> int:
        return len(self.html.encode())


def write_report(scores: Path, out: Path | None = None, *, warn_above: int = WARN_ABOVE) -> Path:
    """Write the report of the folder that ``upriver trace`` made and return the path of its page.

    Args:
        scores: the folder of results.
        out: the folder for ``report.html``, ``report.json``, ``report.jsonl`` and ``top.csv``, or the path of the page
            itself (``X.html``; beside it ``X.json``, ``X.jsonl`` and ``X.top.csv``); the folder of results by default.
        warn_above: bytes of the page, above which its size is warned of.

    Raises:
        InputError: ``scores`` is not such a folder, or the trace is not finished.
        ConfigError: the output cannot be written, or would replace a file that no report wrote.

    Example:
        >>> write_report(Path("scores"))
        PosixPath('scores/report.html')
    """
    folder = read_folder(Path(scores))
    files = report_files(Path(out or scores))
    html = files[0]
    report = build_report(folder)
    page = render(report, title=" · ".join(filter(None, ["Upriver", report["run"]["model"], report["run"]["corpus"]])))
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(html.parent, error) from error
    plain = json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n"
    for path, text in zip(files, (page.html, plain, jsonl_text(report), csv_text(report)), strict=True):
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    if page.size > warn_above:
        what = f"the report is large: {html} has {page.size / 1e6:.1f} MB"
        warnings.warn(f"{what}; trace with a smaller --top for a lighter page", stacklevel=2)
    return html


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
    """Whether a report wrote a file, as its beginning tells."""
    try:
        with open(plain(file), "rb") as there:
            return file.suffix in OURS and bool(OURS[file.suffix].match(there.read(HEAD)))
    except OSError:
        return False


def _unwritable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write the report: got {place} ({error}); choose a folder that you may write to")


def render(report: Json, title: str = "Upriver", quantise_above: int = QUANTISE_ABOVE) -> Page:
    """Make the page of ``report`` (the content of ``report.json``); one of more bytes has its token scores in 8 bits.

    Corpus text reaches the browser only as JSON in a data block, where ``<`` is written ``\\u003c``; the script puts it
    on the page as text.  The content-security policy admits this one script, by its hash, and no network.
    """
    page = _page(report, title, quantise=False)
    if page.size > quantise_above:
        page = _page(report, f"{title} (token scores quantised to 8 bits)", quantise=True)
    return page


def _page(report: Json, title: str, quantise: bool) -> Page:
    queries = [{**q, "passages": [_passage(p, quantise) for p in q["passages"]]} for q in report["queries"]]
    shown = {key: value for key, value in report.items() if key != "manifest"}
    data = json.dumps(
        shown | {"queries": queries, "quantised": quantise}, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    for character in "<\u2028\u2029":  # inert inside HTML
        data = data.replace(character, f"\\u{ord(character):04x}")
    packed, script = len(data) > COMPRESS_ABOVE, code(*SCRIPTS)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    html = environment.from_string(code("page.html.j2")).render(
        title=title,
        style=code("viewer.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        encoding="gzip" if packed else "plain",
        data=base64.b64encode(gzip.compress(data.encode(), 6, mtime=0)).decode() if packed else data,
    )
    return Page(html, quantise)


def code(*names: str) -> str:
    """Read our own files of the page, one after the other, without indentation and comments; no text in them goes over a line."""
    folder = resources.files("upriver.show") / "viewer"
    lines = "\n".join((folder / name).read_text(encoding="utf-8") for name in names).splitlines()
    return "\n".join(line for line in map(str.strip, lines) if line and not line.startswith("// "))


def _passage(passage: Json, quantise: bool) -> Json:
    """Shorten a passage for the page: a text that its tokens repeat is left out, its token scores are rounded."""
    repeated = passage["text"] == "".join(passage["tokens"])
    kept = {key: value for key, value in passage.items() if key != "text" or not repeated}
    if quantise and passage["token_scores"]:
        return kept | {"token_scores": quantised(passage["token_scores"])}
    rounded = [float(f"{score or 0:.{DIGITS}g}") for score in passage["token_scores"]]
    return kept | {"token_scores": [score or 0 for score in rounded]}


def quantised(scores: list[float]) -> dict[str, Any]:
    """Store scores as signed bytes, in base64, and the value of one step; they are off by half a step at most."""
    values = np.nan_to_num(np.asarray(scores, np.float64))
    step = float(np.abs(values).max()) / 127 or 1.0
    codes = np.round(values / step).astype(np.int8)
    return {"step": step if math.isfinite(step) else 1.0, "bytes": base64.b64encode(codes.tobytes()).decode()}


def jsonl_text(report: Json) -> str:
    """Write a line per query in the schema of ``pretraining-tda``, the public viewer of the TrackStar paper (PAIR).

    Scores are in nats where they are known.
    """
    lines = []
    for query in report["queries"]:
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


def csv_text(report: Json) -> str:
    """Write a row per passage and query, without the lists of tokens and layers."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerow(CSV_COLUMNS)
    # quoted, as some versions of Python leave a lone \r bare otherwise
    writer = csv.writer(sink, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for query in report["queries"]:
        for passage in query["passages"]:
            metadata = json.dumps(passage["metadata"], ensure_ascii=False)
            row = {**passage, "query": query["id"], "metadata": metadata}
            writer.writerow([row[column] for column in CSV_COLUMNS])
    return sink.getvalue()
