"""The commands that look at results: ``upriver report`` and ``upriver export``."""

import warnings
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from upriver.show.export import export
from upriver.show.report import write_report
from upriver.show.terminal import say

Corpus = Annotated[Path | None, typer.Option(help="Where the records are now. Default: as for the trace.")]


def report_command(
    scores: Annotated[Path, typer.Argument(help="Folder written by upriver trace.", metavar="SCORES")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder, or .html file whose name the others take. Default: the results' own folder."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="A field of the records, such as year: adds the sums over its groups. May be repeated."),
    ] = None,
    contrast: Annotated[
        tuple[str, str] | None, typer.Option(help="Two questions, of which --by sums the difference too.")
    ] = None,
    corpus: Corpus = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write the report of SCORES: one self-contained HTML file, and the same as JSON, JSONL and CSV."""
    page = written_report(scores, out, by or [], contrast, corpus)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


def written_report(
    scores: Path,
    out: Path | None,
    by: list[str] | None = None,
    contrast: tuple[str, str] | None = None,
    corpus: Path | None = None,
) -> Path:
    """Write a report and say what there is to say of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        page = write_report(scores, out, by=by or [], contrast=contrast, corpus=corpus)
    for warning in caught:
        say(f"note: {warning.message}")
    say(f"report: {page}")
    return page


def export_command(
    results: Annotated[Path, typer.Argument(help="Folder written by upriver trace, or audit.", metavar="SCORES")],
    out: Annotated[Path, typer.Option(help="A .jsonl, .parquet or .csv file that is not there yet.")],
    corpus: Corpus = None,
    keep: Annotated[str | None, typer.Option(help="Write only so many records (100) or such a share (10%).")] = None,
    drop: Annotated[str | None, typer.Option(help="Write all records but so many (100) or such a share (10%).")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="What --keep and --drop go by: a question or set (of several the mean), self_influence, or a column of AUDIT."
        ),
    ] = None,
    lowest: Annotated[bool, typer.Option("--lowest", help="Those with the smallest scores, not the largest.")] = False,
) -> None:
    """Write your own records with their scores; or, with --keep or --drop, a filtered corpus, ready to train on."""
    say(f"written: {export(results, out, corpus=corpus, keep=keep, drop=drop, by=by or None, lowest=lowest)}")
