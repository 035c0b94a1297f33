"""The examples of the documents run as they stand, and the documents name nothing that is not there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["classification", "regression", "own"])
def test_example_of_the_tasks_page_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "docs/tasks.md", "exec"), names)
    result = names["result"]
    top = result.top(result.queries[0]["id"], 5)
    assert len(top) > 0
    assert top["score"].is_monotonic_decreasing
    assert (tmp_path / "scores" / "scores.parquet").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_no_machine_path_in_the_repository():
    for path in [
        p for p in ROOT.rglob("*") if p.suffix in (".py", ".md", ".toml", ".js", ".css", ".json") and p.is_file()
    ]:
        if ".venv" not in path.parts and "build" not in path.parts and path != Path(__file__):
            assert not re.search(r"/(home|root|work)/\w", path.read_text(encoding="utf-8", errors="ignore")), path
