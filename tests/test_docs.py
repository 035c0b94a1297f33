"""The examples of the documents run as they stand; their links lead somewhere, and the files that they name are there."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "peers" / "README.md",
    *sorted((ROOT / "studies").glob("*/README.md")),
]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)
AUDITS = [example for example in EXAMPLES if "up.audit(" in example]
EXAMPLES = [example for example in EXAMPLES if example not in AUDITS]
KINDS = ["classification", "head", "pairs", "regression", "verify", "own", "solver"]
FOLDERS = ("src", "tests", "docs", "benchmarks", "studies")
NAMED = re.compile(rf"(?<![\w/])((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|md|json|toml|xz))\b")
LAYER = re.compile(r"<!-- layer: begin -->\n`python (.*?)`:\n\n(.*?)\n<!-- layer: end -->", re.DOTALL)


def anchors(page: str) -> set[str]:
    """Where a link into a page may lead: its headings, as GitHub writes them."""
    outside = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*?) *$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("example", EXAMPLES, ids=KINDS)
def test_example_of_the_tasks_page_runs_to_its_report(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "docs/tasks.md", "exec"), names)
    result = names["result"]
    top = result.top(result.queries[0]["id"], 5)
    assert len(top) > 0
    assert top["score"].is_monotonic_decreasing
    assert (tmp_path / "scores" / "scores.parquet").exists()
    result.report()
    report = json.loads((tmp_path / "scores" / "report.json").read_text())
    assert "the measurement" in report["sign"]
    assert "the log-probability" not in report["unit"]
    if "transformers" in example:
        return
    assert [x["depth"] for x in report["layers"]] == [0, 1]  # in blocks 0 and 2
    assert report["depth"] == [{"first": b, "last": b} for b in (0, 2)]


def test_example_of_an_audit_finds_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    (example,) = AUDITS
    exec(compile(example, "docs/tasks.md", "exec"), names)
    first = names["frame"].head(180)["row"]
    assert names["flipped"][first].sum() >= 0.85 * names["flipped"].sum()
    top = names["behind"]
    assert (top["score"] < 0).all()
    assert names["flipped"][top["sequence"]].mean() > 0.5
    assert (tmp_path / "audit" / "audit.html").exists()


def test_example_of_the_page_of_truth_runs_to_its_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "truth.md").read_text(), re.DOTALL)
    exec(compile(example, "docs/truth.md", "exec"), {})
    assert len(re.findall(r"0\.\d+ \[-?0\.\d+, [01]\.\d+\]", capsys.readouterr().out)) == 2


def test_anchors_are_those_of_headings():
    page = "# A page\n\n## `name.json`, version 1\n\n```\n# no heading\n```\n\n### Right-hand_side: *both*\n"
    assert anchors(page) == {"a-page", "namejson-version-1", "right-hand_side-both"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            page = document.parent / file if file else document
            assert page.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in anchors(page.read_text()), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_are_there(document):
    missing = [name for name in NAMED.findall(document.read_text()) if not (ROOT / name).exists()]
    assert missing == []


def test_counted_layer_is_what_its_command_prints(monkeypatch, capsys):
    found = LAYER.search((ROOT / "docs" / "cost.md").read_text())
    assert found is not None
    script, *args = shlex.split(found[1])
    monkeypatch.setattr(sys, "argv", [script, *args])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert capsys.readouterr().out.strip() == found[2]


def test_no_machine_path_in_the_repository():
    paths = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    for path in paths:
        if path.suffix in (".py", ".md", ".toml", ".js", ".css", ".json") and path.is_file() and path != Path(__file__):
            assert not re.search(r"/(home|root|work)/\w", path.read_text(encoding="utf-8", errors="ignore")), path
