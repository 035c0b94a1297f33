"""The report of a trace: ``report.html`` and the same content as JSON, JSONL and CSV."""

import re
import warnings
from pathlib import Path

from upriver.errors import ConfigError
from upriver.runtime.artifact import atomic
from upriver.show.data import build_report
from upriver.show.exports import CSV_COLUMNS, csv_text, json_text, jsonl_text
from upriver.show.folder import read_folder
from upriver.show.page import WARN_ABOVE, render

HEAD = 65_536  # bytes that are looked at
OURS = {  # how the files of a report begin
    ".html": re.compile(
        rb'<!doctype html>\n<html lang="en">\n<head>\n(?:<meta name="generator" content="Upriver">\n|<meta charset="utf-8">\n'
        rb'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; script-src \'sha256-)'
    ),
    ".json": re.compile(rb'\{"format": "upriver-report", '),
    ".jsonl": re.compile(rb'\{"example_id": "(?:[^"\\]|\\.)*", "query_set": "upriver", '),
    ".csv": re.compile(re.escape(",".join(CSV_COLUMNS).encode()) + rb"\n"),
}


def write_report(scores: Path, out: Path | None = None) -> Path:
    """Write the report of the folder that ``upriver trace`` made and return the path of its page.

    Args:
        scores: the folder of results.
        out: the folder for ``report.html``, ``report.json``, ``report.jsonl`` and ``top.csv``, or the path of the page
            itself (``X.html``; beside it ``X.json``, ``X.jsonl`` and ``X.top.csv``); the folder of results by default.

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
    _make_folder(html.parent)
    for path, text in zip(files, (page.html, json_text(report), jsonl_text(report), csv_text(report)), strict=True):
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    if page.size > WARN_ABOVE:
        warnings.warn(
            f"the report is large: {html} has {page.size / 1e6:.1f} MB; trace with a smaller --top for a lighter page",
            stacklevel=2,
        )
    return html


def report_files(out: Path) -> list[Path]:
    """The page, JSON, JSONL and CSV that a report at ``out`` (folder or page) consists of; writes nothing.

    Raises:
        ConfigError: one of them is there and is not of an earlier report, or the place cannot be looked at.
    """
    html = out if out.suffix == ".html" else out / "report.html"
    csv = "top.csv" if html.name == "report.html" else f"{html.stem}.top.csv"
    files = [html, html.with_suffix(".json"), html.with_suffix(".jsonl"), html.with_name(csv)]
    for file in files:
        _refuse_foreign(file)
    return files


def _refuse_foreign(file: Path) -> None:
    try:
        with open(file, "rb") as there:
            head = there.read(HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(file, error) from error
    if not OURS[file.suffix].match(head):
        raise ConfigError(
            f"the report would overwrite a file that no report wrote: got {file}; choose another place for the report, "
            "or move that file away"
        )


def is_report(file: Path) -> bool:
    """Whether a report wrote a file, as its beginning tells."""
    try:
        with open(file, "rb") as there:
            return file.suffix in OURS and bool(OURS[file.suffix].match(there.read(HEAD)))
    except OSError:
        return False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write the report: got {place} ({error}); choose a folder that you may write to")
