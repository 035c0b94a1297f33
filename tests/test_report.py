"""The report: what it holds, what it refuses, and that text from a corpus stays text."""

import base64
import gzip
import hashlib
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from report_fixture import HOSTILE, write_scores
from upriver.errors import InputError
from upriver.show.page import SCRIPTS, code, quantised, render
from upriver.show.passages import near_duplicates, sentences
from upriver.show.report import write_report


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_scores(tmp_path_factory.mktemp("report") / "scores")
    write_report(path)
    return path


@pytest.fixture(scope="module")
def report(scores: Path) -> dict[str, Any]:
    return json.loads((scores / "report.json").read_text(encoding="utf-8"))


class Parts(html.parser.HTMLParser):
    """The scripts of a page: their attributes and content, as a browser separates them."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.scripts:
            attrs, content = self.scripts[-1]
            self.scripts[-1] = (attrs, content + data)


def payload(page: str) -> dict[str, Any]:
    attrs, content = Parts(page).scripts[0]
    return json.loads(gzip.decompress(base64.b64decode(content)) if attrs["data-encoding"] == "gzip" else content)


# ---- the data


def test_report_json_has_the_documented_keys(report: dict[str, Any]) -> None:
    documented = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    assert (report["format"], report["version"]) == ("upriver-report", 1)
    query = report["queries"][0]
    for level in (report, query, query["passages"][0], query["spread"], query["documents"]["positive"][0]):
        assert not [key for key in level if f"`{key}`" not in documented]


def test_every_passage_of_the_trace_is_there_with_its_scores(scores: Path, report: dict[str, Any]) -> None:
    top = pd.read_parquet(scores / "top.parquet")
    for query in report["queries"]:
        rows = top[top["query"] == query["id"]]
        assert len(query["passages"]) == len(rows)
        assert {p["side"] for p in query["passages"]} == {"positive", "negative"}
        by_key = rows.set_index(["side", "rank"])
        for p in query["passages"]:
            row = by_key.loc[(p["side"], p["rank"])]
            assert p["score"] == pytest.approx(float(row["score"]), rel=1e-6)
            assert p["score_nats"] == pytest.approx(p["score"] / report["n_train"], rel=1e-5)
            assert p["text"] == row["text"] == "".join(p["tokens"])


def test_tokens_sentences_and_layers_sum_to_the_score(report: dict[str, Any]) -> None:
    for passage in (p for query in report["queries"] for p in query["passages"]):
        near = pytest.approx(passage["score"], rel=1e-4, abs=1e-4)
        assert passage["sums"]["tokens"] == near
        assert passage["sums"]["layers"] == near
        assert sum(s["carried"] for s in passage["sentences"]) == near
        moved = sum(s["predicted"] for s in passage["sentences"]) + passage["token_scores"][-1]
        assert moved == near


def test_documents_are_ranked_by_their_sums(scores: Path, report: dict[str, Any]) -> None:
    frame = pd.read_parquet(scores / "scores.parquet")
    for query in report["queries"]:
        sums = frame.groupby("document")[query["id"]].sum().sort_values()
        best, worst = query["documents"]["positive"][0], query["documents"]["negative"][0]
        assert (best["document"], worst["document"]) == (sums.index[-1], sums.index[0])
        assert best["score"] == pytest.approx(sums.iloc[-1], rel=1e-4)
        assert all(frame.loc[b["sequence"], "document"] == best["document"] for b in best["best"])


def test_survival_and_top_share_agree_with_all_scores(scores: Path, report: dict[str, Any]) -> None:
    frame = pd.read_parquet(scores / "scores.parquet")
    for query in report["queries"]:
        values = frame[query["id"]].to_numpy(float) / report["n_train"]
        spread = query["spread"]
        for sign, name in ((1, "positive"), (-1, "negative")):
            points = spread["survival"][name]
            assert len(points) <= 200
            for x, share in points[:: max(1, len(points) // 9)]:
                assert share == pytest.approx(np.mean(sign * values >= x * (1 - 1e-6)), rel=1e-6)
        top = np.sort(values)[::-1][: int(np.ceil(len(values) / 100))]
        assert spread["top_share"] == pytest.approx(top.sum() / values[values > 0].sum(), rel=1e-5)


def test_parts_that_a_run_did_not_write_are_left_out(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=3)
    for name in ("scores.parquet", "documents.parquet"):
        (path / name).unlink()
    top = pd.read_parquet(path / "top.parquet")
    top[["query", "side", "rank", "sequence", "document", "score", "text"]].to_parquet(path / "top.parquet")
    (path / "manifest.json").write_text('{"stage": "trace"}')
    (path / "queries.json").write_text('[{"id": "blessing", "completion": "yes"}]')
    write_report(path)
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    assert report["queries"][0]["documents"] is None
    assert report["queries"][0]["spread"] is None
    assert len(report["queries"][0]["passages"]) == 6


# ---- what is refused


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: shutil.rmtree(path), "no such folder"),
        (lambda path: [p.unlink() for p in path.iterdir()], "not a folder of results"),
        (lambda path: (path / "manifest.json").unlink(), "not finished"),
        (lambda path: (path / "manifest.json").write_text('{"stage": "fit"}'), "not the result of a trace"),
        (lambda path: (path / "manifest.json").write_text("[]"), "not the result of a trace"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot read"),
        (lambda path: (path / "top.parquet").unlink(), r"no top\.parquet"),
        (lambda path: (path / "top.parquet").write_bytes(b"PAR1 not so"), "cannot read"),
        (lambda path: (path / "queries.json").write_text("[]"), "no queries"),
    ],
)
def test_what_is_not_a_finished_trace_is_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=2, documents=4)
    spoil(path)
    with pytest.raises(InputError, match=words):
        write_report(path)
    assert not list(tmp_path.rglob("report.*"))


# ---- the page


def test_own_code_is_small_and_names_no_address() -> None:
    names = [*SCRIPTS, "viewer.css", "page.html.j2"]
    texts = {name: code(name) for name in names}
    assert sum(len(text.encode()) for text in texts.values()) <= 60_000
    for text in texts.values():
        assert not re.search(r"http(?!-equiv)|//[a-z]+\.[a-z]|url\(|@import|fetch\(|XMLHttp|WebSocket|sendBeacon", text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|srcdoc", text)


def test_viewer_files_are_packaged() -> None:
    folder = resources.files("upriver.show") / "viewer"
    assert {"page.html.j2", "viewer.css", *SCRIPTS} <= {entry.name for entry in folder.iterdir()}


def test_policy_admits_our_script_alone(scores: Path) -> None:
    page = (scores / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    (_, data), (attrs, script) = Parts(page).scripts
    assert attrs == {}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy.group(1)
    assert policy.group(1).startswith("default-src 'none';")
    assert "connect-src" not in policy.group(1)
    assert "<" not in data


def test_page_holds_the_same_counts_as_report_json(scores: Path, report: dict[str, Any]) -> None:
    shown = payload((scores / "report.html").read_text(encoding="utf-8"))
    assert [len(q["passages"]) for q in shown["queries"]] == [len(q["passages"]) for q in report["queries"]]
    assert "manifest" not in shown


def test_hostile_text_is_inert_in_an_uncompressed_page(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=4, per_side=2, tokens=44, documents=12)
    page = write_report(path).read_text(encoding="utf-8")
    parts = Parts(page)
    assert parts.scripts[0][0]["data-encoding"] == "plain"
    assert len(parts.scripts) == 2
    assert "img" not in parts.tags
    assert "b" in parts.tags  # our own <noscript>, nothing of the corpus
    assert payload(page)["queries"][3]["prompt"] == HOSTILE


def test_large_pages_quantise_token_scores_and_say_so(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upriver.show.page.QUANTISE_ABOVE", 1000)
    page = render(report)
    assert page.quantised
    assert "quantised" in page.html.split("</title>")[0]
    shown = payload(page.html)["queries"][0]["passages"][0]["token_scores"]
    exact = np.array(report["queries"][0]["passages"][0]["token_scores"])
    values = np.frombuffer(base64.b64decode(shown["bytes"]), np.int8) * shown["step"]
    assert np.abs(values - exact).max() <= shown["step"] * 0.501
    assert quantised([0.0, 0.0])["step"] == 1.0


def test_a_very_large_page_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upriver.show.report.WARN_ABOVE", 1000)
    path = write_scores(tmp_path / "scores", queries=1, per_side=2, documents=4)
    with pytest.warns(UserWarning, match="report is large"):
        write_report(path, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "report.html").exists()


def test_lone_surrogates_are_replaced(scores: Path, report: dict[str, Any]) -> None:
    assert r"\ud800" in pd.read_parquet(scores / "top.parquet")["metadata"][0]
    assert report["queries"][0]["passages"][0]["metadata"]["odd"] == "\ufffd<i>"


def test_jsonl_follows_the_schema_of_the_public_viewer(scores: Path, report: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (scores / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["example_id"] for line in lines] == [q["id"] for q in report["queries"]]
    for line in lines:
        assert isinstance(line["inputs_plaintext"], str)
        assert isinstance(line["targets_plaintext"], str)
        for name in ("proponent", "opponent"):
            texts, ids, values = line[f"{name}s"], line[f"{name}_ids"], line[f"{name}_scores"]
            assert len(texts) == len(ids) == len(values) == 20
        assert min(line["proponent_scores"]) > max(line["opponent_scores"])


def test_csv_has_a_row_per_passage(scores: Path, report: dict[str, Any]) -> None:
    frame = pd.read_csv(scores / "top.csv")
    assert len(frame) == sum(len(q["passages"]) for q in report["queries"])
    assert frame["score"].tolist() == [p["score"] for q in report["queries"] for p in q["passages"]]


# ---- words and sentences


def test_sentences_cover_every_token_once_and_know_abbreviations() -> None:
    text = "Mr|.| Speaker|,| thank| you|.| It| is| late|!|\n\n|Go| to| the| U.S|."
    tokens = text.split("|")
    spans = sentences(tokens)
    assert ["".join(tokens[a:b]) for a, b in spans] == ["Mr. Speaker, thank you.", " It is late!\n\n", "Go to the U.S."]
    assert [i for a, b in spans for i in range(a, b)] == list(range(len(tokens)))
    assert sentences([]) == []


def test_near_duplicates_point_to_the_first_of_their_kind() -> None:
    base = "we hold these truths to be self evident that all men are created equal and endowed with rights"
    other = "something else entirely that shares nothing with the others"
    texts = [base, base.upper() + "!", other, base + " " + base[::-1], "short"]
    assert near_duplicates(texts) == [0, 0, 2, 0, 4]
    assert near_duplicates(["", ""]) == [0, 1]
    assert near_duplicates(["+---+---+", "\U0001f642\U0001f642", "+---+---+"]) == [0, 1, 0]
    assert near_duplicates(["短い文章が二つここにある", "短い文章が二つここにある。"]) == [0, 0]


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "headless no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync no-first-run"
)


def rendered(page: Path, profile: Path, place: str = "") -> str:
    flags = [f"--{flag}" for flag in FLAGS.split()]
    flags += ["--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom", f"--user-data-dir={profile}"]
    command = [str(CHROMIUM), *flags, page.resolve().as_uri() + place]
    environment = {**os.environ, "HOME": str(profile)}
    for _ in range(3):  # the data is unpacked beside the clock that the browser's time budget counts
        dom = subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment).stdout.decode()
        if 'class="card ' in dom:
            break
    return dom


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_browser_draws_every_card_and_runs_nothing_else(
    scores: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    dom = rendered(scores / "report.html", tmp_path, "#query=hostile+%3C%2Fscript%3E&side=positive&rank=2")
    tags = Parts(dom).tags
    passages = report["queries"][3]["passages"]
    assert dom.count('class="card ') == sum(p["duplicate_of"] is None for p in passages)
    assert tags.count("script") == 2
    assert "img" not in tags
    assert "iframe" not in tags
    assert "alert(1)" in dom
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in dom
    opened = next(p for p in passages if (p["side"], p["rank"]) == ("positive", 2))
    assert dom.count('"t pos" style') + dom.count('"t neg" style') >= len(opened["tokens"])
    assert "✓ sum over 18 layers" in dom
    assert "✓ sum over" in dom


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_browser_draws_documents_and_sentences(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=4, tokens=44, documents=9, blocks=12)
    page = write_report(path)
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    documents = report["queries"][0]["documents"]
    dom = rendered(page, tmp_path / "a", "#query=blessing&by=documents")
    assert dom.count('class="card ') == len(documents["positive"]) + len(documents["negative"])
    assert "The sum over" in dom
    best = report["queries"][0]["passages"][0]
    dom = rendered(page, tmp_path / "b", "#query=blessing&mode=sentences&side=positive&rank=1")
    assert dom.count('class="sum ') == len(best["sentences"])
    assert len(report["depth"]) == 9
    assert dom.count('class="cell ') == 36


ACTIONS = """{
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const cards = () => document.querySelectorAll(".card").length;
const out = {};
const wait = setInterval(() => {
  if (!document.querySelector("#detail .passage")) return;
  clearInterval(wait);
  press("j"); out.second = document.querySelector("[aria-selected=true]").getAttribute("aria-label");
  press("s"); out.sums = document.querySelectorAll(".sum").length;
  press("p"); out.moved = document.querySelectorAll(".sum").length;
  document.querySelector("#filters input[type=checkbox]").click(); out.calm = cards();
  document.querySelectorAll("#filters input[type=checkbox]")[1].click(); out.unfolded = cards();
  const search = document.getElementById("search");
  search.value = "no such words"; search.dispatchEvent(new Event("input")); out.none = cards();
  press("]"); out.question = document.querySelector("#question .label").textContent;
  press("d"); out.documents = cards();
  const overlap = document.querySelectorAll("#filters input[type=range]")[1];
  const chosen = document.querySelector("#filters select");
  overlap.value = 40; overlap.dispatchEvent(new Event("input"));
  chosen.selectedIndex = 1; chosen.dispatchEvent(new Event("change"));
  press("d");
  const drawn = document.querySelector("#filters");
  out.kept = [drawn.querySelectorAll("input[type=range]")[1].value, drawn.querySelectorAll("output")[1].textContent,
    drawn.querySelector("select").selectedIndex, drawn.querySelector("select") !== chosen];
  document.title = JSON.stringify(out);
}, 100);
}"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_keys_and_filters(scores: Path, report: dict[str, Any], tmp_path: Path) -> None:
    page = re.sub(r"<meta http-equiv.*?>", "", (scores / "report.html").read_text(encoding="utf-8"), count=1)
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{ACTIONS}</script></body>"), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", rendered(tmp_path / "page.html", tmp_path / "profile"), re.S)
    assert title
    out = json.loads(html.unescape(title.group(1)))
    first, second = report["queries"][:2]
    shown = [p for p in first["passages"] if p["duplicate_of"] is None]
    assert f"raises, rank {shown[1]['rank']}, " in out["second"]
    assert out["sums"] == out["moved"] == len(shown[1]["sentences"])
    assert out["calm"] == sum(not p["spurious"] for p in shown)
    assert out["unfolded"] == sum(not p["spurious"] for p in first["passages"])
    assert out["none"] == 0
    assert out["question"].startswith("Question 2 of 4")
    assert out["documents"] == sum(len(side) for side in second["documents"].values())
    assert out["kept"] == ["40", "40 %", 1, True]
