"""The report of a trace: ``report.html`` and the same content as JSON, JSONL and CSV."""

import warnings
from pathlib import Path

from upriver.errors import ConfigError
from upriver.runtime.store import atomic
from upriver.show.data import build_report
from upriver.show.exports import csv_text, json_text, jsonl_text
from upriver.show.folder import read_folder
from upriver.show.page import WARN_ABOVE, render


def write_report(scores: Path, out: Path | None = None) -> Path:
    """Write the report of the folder that ``upriver trace`` made and return the path of its page.

    Args:
        scores: the folder of results.
        out: the folder for ``report.html``, ``report.json``, ``report.jsonl`` and ``top.csv``, or the path of the page
            itself (``.html``; the others go beside it); the folder of results by default.

    Raises:
        InputError: ``scores`` is not such a folder, or the trace is not finished.
        ConfigError: the output cannot be written.

    Example:
        >>> write_report(Path("scores"))
        PosixPath('scores/report.html')
    """
    report = build_report(read_folder(Path(scores)))
    html = _destination(Path(out or scores))
    page = render(report, title=" · ".join(filter(None, ["Upriver", report["run"]["model"], report["run"]["corpus"]])))
    texts = {
        html: page.html,
        html.with_suffix(".json"): json_text(report),
        html.with_suffix(".jsonl"): jsonl_text(report),
        html.with_name("top.csv"): csv_text(report),
    }
    for path, text in texts.items():
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    if page.size > WARN_ABOVE:
        warnings.warn(
            f"the report is large: {html} has {page.size / 1e6:.1f} MB; trace with a smaller --top for a lighter page",
            stacklevel=2,
        )
    return html


def _destination(out: Path) -> Path:
    html = out if out.suffix == ".html" else out / "report.html"
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the report: got {out} ({error}); choose a folder that you may write to"
        ) from error
    return html
