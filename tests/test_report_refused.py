"""What the report refuses: folders that are no finished trace, and places that hold somebody else's files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from report_fixture import seal, write_scores
from upriver.errors import ConfigError, InputError
from upriver.runtime.artifact import write_json
from upriver.show.report import report_files, write_report
from upriver.show.scores import Scores
from upriver.show.terminal import terminal_summary

NAMES = ["report.html", "report.json", "report.jsonl", "top.csv"]
TOO_LONG = "x" * 300  # for a file name


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return write_scores(tmp_path / "scores", queries=2, per_side=2, documents=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- folders


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: shutil.rmtree(path), "no such folder"),
        (lambda path: [p.unlink() for p in path.iterdir()], "not a folder of results"),
        (lambda path: (path / "manifest.json").unlink(), "not finished"),
        (lambda path: write_json(path / "manifest.json", {"key": {"stage": "fit"}}), "not the result of a trace"),
        (lambda path: (path / "manifest.json").write_text("[]"), "not the result of a trace"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot read"),
        (lambda path: (path / "top.parquet").unlink(), r"no top\.parquet"),
        (lambda path: (path / "top.parquet").write_bytes(b"PAR1 not so"), "cannot read"),
        (lambda path: [(path / "queries.json").write_text("[]"), seal(path)], "no queries"),
        (lambda path: (path / "queries.json").write_text("[]"), r"cannot read .*queries\.json: its checksum"),
        (lambda path: seal(path, damping=0.1), "cannot read .* its entry 'damping' is not as this version writes it"),
    ],
)
def test_what_is_not_a_finished_trace_is_refused(scores: Path, spoil: Any, words: str) -> None:
    spoil(scores)
    with pytest.raises(InputError, match=words):
        write_report(scores)
    assert not list(scores.parent.rglob("report.*"))


READERS: dict[str, Callable[[Path], object]] = {
    "report": write_report,
    "terminal": lambda path: terminal_summary(path, Console()),
    "python": Scores,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match=f"cannot read the folder of results: got .*{TOO_LONG}.*; give the folder"):
        read(tmp_path / TOO_LONG)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_closed_folder_is_refused(
    scores: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", closed)  # root may read any folder
    with pytest.raises(InputError, match=f"cannot read the folder of results: got {scores} .*Permission denied"):
        read(scores)


# ---- places


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_somebody_else_is_named_and_kept(scores: Path, tmp_path: Path, name: str) -> None:
    """As in ``upriver run`` with ``out = "."``."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"text": "mine"}\n')
    with pytest.raises(ConfigError, match=f"would overwrite a file that no report wrote: got {out / name}; choose"):
        write_report(scores, out)
    assert contents(out) == {name: b'{"text": "mine"}\n'}


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.json", "corpus.top.csv"])
def test_a_corpus_beside_the_page_is_kept(scores: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "mine"}\n')
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"got {tmp_path / name}; choose another place"):
        write_report(scores, tmp_path / "corpus.html")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["manifest", "queries"])
def test_the_results_themselves_are_kept(scores: Path, name: str) -> None:
    before = contents(scores)
    with pytest.raises(ConfigError, match=rf"got {scores / name}\.json; choose another place"):
        write_report(scores, scores / f"{name}.html")
    assert contents(scores) == before


def test_a_place_can_be_asked_about_before_anything_is_computed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [file.name for file in report_files(out)] == NAMES
    assert not out.exists()
    out.mkdir()
    (out / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"report\.json; choose another place"):
        report_files(out / "report.html")


@pytest.mark.parametrize("gone", [None, *NAMES])
def test_a_report_replaces_an_earlier_one(scores: Path, tmp_path: Path, gone: str | None) -> None:
    out = tmp_path / "out"
    write_report(scores, out)
    before = contents(out)
    if gone:
        (out / gone).unlink()
    write_report(scores, out)
    assert contents(out) == before
    assert sorted(before) == NAMES


def test_a_page_of_an_earlier_version_is_replaced_and_one_that_begins_like_it_is_not(
    scores: Path, tmp_path: Path
) -> None:
    """Pages did not always name what made them: then the first line that is ours is the policy for the script."""
    page = write_report(scores, tmp_path / "out")
    now = page.read_bytes()
    ours, policy = b'<meta name="generator" content="Upriver">\n', now.index(b"<meta http-equiv")
    page.write_bytes(now.replace(ours, b"", 1))
    assert page.read_bytes() != now
    write_report(scores, tmp_path / "out")
    assert page.read_bytes() == now
    page.write_bytes(now[:policy].replace(ours, b"") + b"<title>mine</title>\n")
    with pytest.raises(ConfigError, match=r"report\.html; choose another place"):
        write_report(scores, tmp_path / "out")


def test_a_report_replaces_that_of_another_trace_with_odd_ids(scores: Path, tmp_path: Path) -> None:
    queries = json.loads((scores / "queries.json").read_text(encoding="utf-8"))
    queries[0]["id"] = 'a "quoted\\" id 🎉'
    (scores / "queries.json").write_text(json.dumps(queries), encoding="utf-8")
    seal(scores)
    write_report(scores, tmp_path / "out")
    other = write_scores(tmp_path / "other", queries=1, per_side=3, documents=4)
    write_report(other, tmp_path / "out")
    write_report(other, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_two_pages_in_a_folder_keep_their_files(scores: Path, tmp_path: Path) -> None:
    other = write_scores(tmp_path / "other", queries=1, per_side=3, documents=4)
    out = tmp_path / "out"
    write_report(scores, out)
    write_report(scores, out / "a.html")
    before = contents(out)
    for name in ("b.html", "top.html"):
        write_report(other, out / name)
    now = contents(out)
    assert {name: now[name] for name in before} == before
    assert sorted(set(now) - set(before)) == [
        "b.html", "b.json", "b.jsonl", "b.top.csv", "top.html", "top.json", "top.jsonl", "top.top.csv",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [TOO_LONG, f"{TOO_LONG}.html", "file/out", "file"])
def test_a_place_that_cannot_be_written_is_refused(scores: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot write the report: got .*{name}.*; choose a folder"):
        write_report(scores, tmp_path / name)
    assert contents(tmp_path) == before


def test_a_folder_where_a_file_should_be_is_refused(scores: Path) -> None:
    (scores / "report.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write the report: got .*report\.jsonl"):
        write_report(scores)
    assert not (scores / "report.html").exists()
