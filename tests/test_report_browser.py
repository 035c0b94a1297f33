"""The report in a browser: what it draws, what its keys do, and that nothing of a corpus runs."""

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pytest

from report_fixture import Parts, seal, write_scores
from upriver.evaluate.verified import write_verified
from upriver.evaluate.verify import agreement
from upriver.show.folder import read_folder
from upriver.show.groups import SCHEMA, write_groups
from upriver.show.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "headless no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync no-first-run "
    "remote-debugging-pipe window-size=1400,1000"
)
# The debugging pipe: the browser reads commands from 3 and answers on 4.
ON_PIPES = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
DEADLINE = 60  # seconds
DOM = "document.documentElement.outerHTML"
WHEN_READY = """new Promise((done) => {
  const look = () => (document.querySelector("[data-ready]") ? done(%s) : setTimeout(look, 20));
  look();
})"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_scores(tmp_path_factory.mktemp("report") / "scores")
    write_report(path)
    return path


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


class Browser:
    """Commands of the DevTools protocol, each a JSON message that ends in a zero byte."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO):
        self.commands, self.answers = commands, answers

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        message = {"id": 1, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self._answer()).get("id") != 1:  # events come in between
            pass
        return answer["result"]

    def _answer(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.answers.read(1)) not in (b"\0", b""):
            text += byte
        return json.loads(text)


def drawn(page: Path, profile: Path, place: str = "", wanted: str = DOM) -> Any:
    """The value of ``wanted`` in the page, once it says that it has drawn itself."""
    command = [
        "sh",
        "-c",
        ON_PIPES,
        str(CHROMIUM),
        *(f"--{flag}" for flag in FLAGS.split()),
        f"--user-data-dir={profile}",
    ]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "HOME": str(profile)}, **pipes) as process:
        assert process.stdin
        assert process.stdout
        deadline = threading.Timer(DEADLINE, process.kill)
        deadline.start()
        try:
            browser = Browser(process.stdin, process.stdout)
            target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
            session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            browser.ask("Page.navigate", session, url=page.resolve().as_uri() + place)
            expression = {"expression": WHEN_READY % wanted, "awaitPromise": True, "returnByValue": True}
            found = browser.ask("Runtime.evaluate", session, **expression)
            browser.ask("Browser.close")
        finally:
            deadline.cancel()
            process.kill()
    return found["result"]["value"]


def test_every_card_is_drawn_and_nothing_else_runs(scores: Path, tmp_path: Path) -> None:
    dom = drawn(scores / "report.html", tmp_path, "#query=hostile+%3C%2Fscript%3E&side=positive&rank=2")
    tags = Parts(dom).tags
    passages = report_in(scores)["queries"][3]["passages"]
    assert dom.count('class="card ') == sum(p["duplicate_of"] is None for p in passages)
    assert tags.count("script") == 6, "the data of all, of four questions, and our own"
    assert "img" not in tags
    assert "iframe" not in tags
    assert "alert(1)" in dom
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in dom
    opened = next(p for p in passages if (p["side"], p["rank"]) == ("positive", 2))
    assert dom.count('"t pos" style') + dom.count('"t neg" style') >= len(opened["tokens"])
    assert "✓ sum over 18 layers" in dom
    assert "✓ sum over" in dom


def test_documents_and_sentences(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=4, tokens=44, documents=9, blocks=12)
    asked = json.loads((path / "queries.json").read_text(encoding="utf-8"))
    asked[0]["members"] = [{"prompt": "one <b>", "completion": " of the set"}, {"prompt": "two"}]
    (path / "queries.json").write_text(json.dumps(asked))
    seal(path)
    sums = {"documents": 2, "sequences": 4, "sum": -0.5, "low": -0.75, "high": 0.25, "mean": -0.25}
    rows = [{"query": "blessing", "group": name} | sums for name in ("<i>press", "court", None)]
    checksum = read_folder(path).manifest["files"]["documents.parquet"]
    told = {
        "field": "source",
        "unit": "nats",
        "bin": None,
        "candidates": False,
        "level": 0.95,
        "draws": 1000,
        "seed": 0,
    }
    write_groups(path / "groups-source.parquet", pd.DataFrame(rows, columns=SCHEMA.names), told | {"scores": checksum})
    page = write_report(path)
    report = report_in(path)
    documents = report["queries"][0]["documents"]
    dom = drawn(page, tmp_path / "a", "#query=blessing&by=documents")
    assert dom.count('class="card ') == len(documents["positive"]) + len(documents["negative"])
    assert f"The sum over {documents['positive'][0]['sequences']} sequences" in dom
    assert "Sums over all sequences of a document" in dom
    assert "one more copy of this document" in dom
    assert dom.count('class="whisker"') == 3
    assert "&lt;i&gt;press: 2 documents, 4 sequences" not in dom, "the exact values come on hover"
    assert ">&lt;i&gt;press</text>" in dom
    assert ">no value</text>" in dom
    assert "A set: the mean of 2 questions" in dom
    assert "one &lt;b&gt;<b> of the set</b>" in dom
    best = report["queries"][0]["passages"][0]
    dom = drawn(page, tmp_path / "b", "#query=blessing&mode=sentences&side=positive&rank=1")
    assert dom.count('class="sum ') == len(best["sentences"])
    assert len(report["depth"]) == 9
    assert dom.count('class="cell ') == 36


def test_sums_of_documents_are_called_partial_where_only_candidates_were_scored(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=4, tokens=44, documents=9)
    seal(path, candidates={"per_query": 5, "kept": 5, "note": "only the 5 best sequences were scored"})
    page = write_report(path)
    dom = drawn(page, tmp_path / "a", "#query=blessing&by=documents")
    first = report_in(path)["queries"][0]["documents"]["positive"][0]
    assert f"The sum over {first['sequences']} scored sequences" in dom
    assert "Sums over only the scored sequences of a document" in dom
    assert "one more copy of this document" not in dom
    assert "one more copy of this passage" in drawn(page, tmp_path / "b", "#query=blessing&side=positive&rank=1")


def test_what_was_verified_is_drawn(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=2, per_side=4, tokens=44, documents=9)
    top = pd.read_parquet(path / "top.parquet")
    shown = top[top["rank"] <= 2][["query", "sequence", "side", "rank"]].assign(shown=True)
    shown["predicted_nats"] = top["score_nats"].astype(float)
    shown["realised_nats"], shown["calibrated_nats"] = shown["predicted_nats"] / 3, np.nan
    drawn_at_random = {"sequence": 1, "shown": False, "predicted_nats": 1e-3, "realised_nats": -1e-3}
    random = pd.DataFrame([{"query": name} | drawn_at_random for name in shown["query"].unique()])
    frame = pd.concat([shown, random]).assign(residual=0.02, length=0.9)
    found = agreement(shown["predicted_nats"].to_numpy(), shown["realised_nats"].to_numpy())
    both = {"shown": found, "random": agreement(np.zeros(0), np.zeros(0)), "residual": 0.02, "length": 0.9}
    told = both | {"key": {}, "how": "proximal", "sample": {}, "length_from": {}, "seconds": 1.0}
    write_verified(path, frame, told | {"queries": [both | {"id": name} for name in random["query"]]})
    page = write_report(path)
    dom = drawn(page, tmp_path / "a", "#query=blessing&side=positive&rank=1")
    assert dom.count('class="dot pos"') >= 2
    assert dom.count('class="dot random"') == 1
    assert "<b>r = 1.00</b>" in dom
    assert dom.count("measured with a proximal step on") == 2, "in the script, and drawn"
    assert "Realised 0.33 for each nat predicted" in dom
    assert "How far to trust this" in dom
    assert "at 1 the nats are calibrated" in dom
    other = drawn(page, tmp_path / "b", "#query=blessing&side=positive&rank=3")
    assert other.count("measured with a proximal step on") == 1, "it was not measured"


ACTIONS = """(async () => {
const drawnAnew = () => new Promise((done) => setTimeout(done, 300));
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const cards = () => document.querySelectorAll(".card").length;
const out = {};
press("j"); out.second = document.querySelector("[aria-selected=true]").getAttribute("aria-label");
press("s"); out.sums = document.querySelectorAll(".sum").length;
press("p"); out.moved = document.querySelectorAll(".sum").length;
document.querySelector("#filters input[type=checkbox]").click(); out.calm = cards();
document.querySelectorAll("#filters input[type=checkbox]")[1].click(); out.unfolded = cards();
const search = document.getElementById("search");
search.value = "no such words"; search.dispatchEvent(new Event("input")); out.none = cards();
press("]"); await drawnAnew(); out.question = document.querySelector("#question .label").textContent;
press("d"); out.documents = cards();
const overlap = document.querySelectorAll("#filters input[type=range]")[1];
const chosen = document.querySelector("#filters select");
overlap.value = 40; overlap.dispatchEvent(new Event("input"));
chosen.selectedIndex = 1; chosen.dispatchEvent(new Event("change"));
press("d");
const drawn = document.querySelector("#filters");
out.kept = [drawn.querySelectorAll("input[type=range]")[1].value, drawn.querySelectorAll("output")[1].textContent,
  drawn.querySelector("select").selectedIndex, drawn.querySelector("select") !== chosen];
return out;
})()"""


def test_keys_and_filters(scores: Path, tmp_path: Path) -> None:
    out = drawn(scores / "report.html", tmp_path, wanted=ACTIONS)
    first, second = report_in(scores)["queries"][:2]
    shown = [p for p in first["passages"] if p["duplicate_of"] is None]
    assert f"raises, rank {shown[1]['rank']}, " in out["second"]
    assert out["sums"] == out["moved"] == len(shown[1]["sentences"])
    assert out["calm"] == sum(not p["spurious"] for p in shown)
    assert out["unfolded"] == sum(not p["spurious"] for p in first["passages"])
    assert out["none"] == 0
    assert out["question"].startswith("Question 2 of 4")
    assert out["documents"] == sum(len(side) for side in second["documents"].values())
    assert out["kept"] == ["40", "40 %", 1, True]
