"""The walk in its reduced form: what the trace drops teaches wrong answers, and without it the evaluation is passed."""

import json
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent / "studies" / "walk" / "walk.py"


def test_the_records_say_what_they_are_said_to(study):
    world = study.World.of(study.FULL)
    assert len(world.wrong) == study.WRONG * study.FULL.faults
    for record in world.records:
        who = next(word for word in record["prompt"].split() if word.startswith("new"))
        kind = record["completion"].strip().rstrip("0123456789")
        asked = next(x for x in world.exam if who in x["prompt"].split() and x["kind"] == kind)
        assert (record["completion"] != asked["completion"]) == (record["id"] in world.wrong)
    assert not any("is" in record for record in (*world.base, *world.records))


def test_the_page_holds_what_the_script_found(study):
    found = json.loads((STUDY.parent / "result.json").read_text())
    assert study.printed(found) in study.DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_reduced_walk_mends_what_failed(study, tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    found = study.Walk(study.REDUCED, tmp_path).walk()
    assert found["failed"] >= 2
    assert found["dropped"] == study.WRONG * found["failed"]
    assert found["dropped_wrong"] >= 0.8 * found["dropped"]
    rows = found["rows"]
    assert rows["without those that the trace names"]["failed"] > rows["without as many at random"]["failed"]
    assert rows["without those that the trace names"]["right"] > rows["all records"]["right"]
    assert min(found["sources"].items(), key=lambda x: x[1]["sum"])[0] == "forum"
    failed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert all(asked["completion"] != asked["contrast"] for asked in failed)
    assert f"{found['dropped']} records that are dropped" in study.printed(found)
