"""The report: what it holds, and that text from a corpus stays text."""

import base64
import hashlib
import io
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from report_fixture import HOSTILE, Parts, payload, seal, solved, write_scores
from upriver.show.data import layers_by_depth, report_head, report_queries, report_trust
from upriver.show.folder import Folder, read_folder
from upriver.show.groups import read_groups
from upriver.show.page import SCRIPTS, code, quantised
from upriver.show.passages import near_duplicates, sentences
from upriver.show.report import CSV_COLUMNS, csv_text, write_report
from upriver.show.scores import Scores


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_scores(tmp_path_factory.mktemp("report") / "scores")
    write_report(path)
    return path


@pytest.fixture(scope="module")
def report(scores: Path) -> dict[str, Any]:
    return json.loads((scores / "report.json").read_text(encoding="utf-8"))


def build_report(folder: Folder) -> dict[str, Any]:
    """What ``report.json`` holds, without the file."""
    tables = read_groups(folder.path, folder.manifest)
    queries = list(report_queries(folder, tables))
    return report_head(folder, tables) | {"queries": queries, "trust": report_trust(folder, queries)}


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


def test_spans_are_read_once_for_all_queries(scores: Path) -> None:
    read = []

    class Counting(Folder):
        def spans(self) -> pd.DataFrame:
            read.append(1)
            return super().spans()

    build_report(Counting(*read_folder(scores)))
    assert len(read) == 1


@pytest.mark.parametrize("candidates", [None, {"per_query": 5, "kept": 20, "note": "the 5 best of each query"}])
def test_report_and_page_say_whether_only_candidates_were_scored(tmp_path: Path, candidates: Any) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=2, documents=4)
    seal(path, candidates=candidates)
    page = write_report(path)
    for shown in (payload(page.read_text(encoding="utf-8")), json.loads((path / "report.json").read_text())):
        assert shown["candidates"] is bool(candidates)


def test_parts_that_a_run_did_not_write_are_left_out(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=3)
    for name in ("scores.parquet", "documents.parquet"):
        (path / name).unlink()
    top = pd.read_parquet(path / "top.parquet")
    top[["query", "side", "rank", "sequence", "document", "score", "text"]].to_parquet(path / "top.parquet")
    (path / "manifest.json").unlink()
    (path / "queries.json").write_text('[{"id": "blessing", "completion": "yes"}]')
    seal(path)
    write_report(path)
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    assert report["queries"][0]["documents"] is None
    assert report["queries"][0]["spread"] is None
    assert len(report["queries"][0]["passages"]) == 6


def test_layers_of_a_block_whose_names_end_alike_are_told_apart() -> None:
    names = [f"h.{block}.{name}" for block in (0, 3) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    layers = [{"name": name, "kind": name.split(".")[-1], "block": int(name[2])} for name in names]
    found = layers_by_depth({"layers": layers})
    assert [x["kind"] for x in found] == ["attn.c_proj", "c_fc", "mlp.c_proj"] * 2
    assert [x["depth"] for x in found] == [0, 0, 0, 1, 1, 1]


# ---- how the queries were solved


def test_the_panel_shows_held_out_energy_beside_that_of_the_gradient(tmp_path: Path) -> None:
    path = solved(write_scores(tmp_path / "scores", queries=2, per_side=2, documents=4))
    report = build_report(read_folder(path))
    facts = {f["label"]: f for f in next(g["facts"] for g in report["trust"] if g["title"] == "Solver")}
    assert facts["Solver"]["value"] == "EK-FAC + 3 CG steps"
    assert (facts["Converged"]["value"], facts["Converged"]["state"]) == ("yes", "ok")
    energy = facts["Held-out energy, solution"]
    assert (energy["value"], energy["state"]) == ("18.4 to 341", "ok")
    assert "240 sequences (30,000 tokens)" in energy["note"]
    assert facts["Held-out energy, plain gradient"]["value"] == "8.50 to 11.5"
    assert (facts["Best scale"]["value"], "calibrated" in facts["Best scale"]["note"]) == ("0.013 to 0.30", True)
    assert [q["solution"]["best_energy"] for q in report["queries"]] == [341.2, 18.41]
    assert not any(f["label"] == "Curvature" for g in report["trust"] for f in g["facts"])


def test_a_solution_that_did_not_converge_or_gains_nothing_is_a_warning(tmp_path: Path) -> None:
    worse = {"converged": False, "why": "the Hessian is indefinite: use the Gauss-Newton matrix", "best_energy": 3.0}
    path = solved(write_scores(tmp_path / "scores", queries=2, per_side=2, documents=4), worse)
    report = build_report(read_folder(path))
    facts = {f["label"]: f for f in next(g["facts"] for g in report["trust"] if g["title"] == "Solver")}
    assert (facts["Converged"]["value"], facts["Converged"]["state"]) == ("1 of 2 questions", "warn")
    assert facts["Converged"]["note"] == worse["why"]
    assert facts["Held-out energy, solution"]["state"] == "warn"


def test_the_energy_of_the_gradient_itself_is_neither_good_nor_bad(tmp_path: Path) -> None:
    path = solved(write_scores(tmp_path / "scores", queries=2, per_side=2, documents=4), {"best_energy": 8.5})
    report = build_report(read_folder(path))
    facts = {f["label"]: f for f in next(g["facts"] for g in report["trust"] if g["title"] == "Solver")}
    assert facts["Held-out energy, solution"]["state"] is None


@pytest.mark.parametrize("solution", [None, {}, {"converged": True}, {"best_energy": None, "gradient": None}])
def test_a_run_without_held_out_energy_shows_none(tmp_path: Path, solution: Any) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=2, documents=4)
    queries = [query | {"solution": solution} for query in json.loads((path / "queries.json").read_text())]
    (path / "queries.json").write_text(json.dumps(queries))
    seal(path)
    report = build_report(read_folder(path))
    assert not any("energy" in f["label"] for g in report["trust"] for f in g["facts"])


def test_columns_of_further_dampings_are_no_queries(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=2, per_side=2, documents=4)
    plain = build_report(read_folder(path))
    for name in ("scores", "documents"):
        frame = pd.read_parquet(path / f"{name}.parquet")
        for query in plain["queries"]:
            frame[f"{query['id']}@0.01x"] = -2 * frame[query["id"]]
        frame.to_parquet(path / f"{name}.parquet")
    seal(path)
    again = build_report(read_folder(path))
    assert {k: x for k, x in again.items() if k != "manifest"} == {k: x for k, x in plain.items() if k != "manifest"}
    scores = Scores(path)
    assert list(scores.top("blessing", 1)["query"]) == ["blessing"]
    assert "blessing@0.01x" in scores.frame()


# ---- the page


def test_own_code_is_small_and_names_no_address() -> None:
    names = [*SCRIPTS, "viewer.css", "page.html.j2"]
    texts = {name: code(name) for name in names}
    assert sum(len(text.encode()) for text in texts.values()) <= 61_000
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
    *data, (attrs, script) = Parts(page).scripts
    assert attrs == {}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy.group(1)
    assert policy.group(1).startswith("default-src 'none';")
    assert "connect-src" not in policy.group(1)
    assert len(data) == 5, "what is said of all questions, and a block for each"
    assert not any("<" in content for _, content in data)


def test_page_holds_the_same_counts_as_report_json(scores: Path, report: dict[str, Any]) -> None:
    shown = payload((scores / "report.html").read_text(encoding="utf-8"))
    assert [len(q["passages"]) for q in shown["queries"]] == [len(q["passages"]) for q in report["queries"]]
    assert "manifest" not in shown


def test_hostile_text_is_inert_in_an_uncompressed_page(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=4, per_side=2, tokens=44, documents=12)
    page = write_report(path).read_text(encoding="utf-8")
    parts = Parts(page)
    assert [attrs["data-encoding"] for attrs, _ in parts.scripts[1:-1]] == ["plain"] * 4
    assert "img" not in parts.tags
    assert "b" in parts.tags  # our own <noscript>, nothing of the corpus
    assert payload(page)["queries"][3]["prompt"] == HOSTILE


def test_large_pages_quantise_token_scores_and_say_so(scores: Path, report: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(scores, tmp_path, quantise_above=1000).read_text(encoding="utf-8")
    assert "quantised" in page.split("</title>")[0]
    assert payload(page)["quantised"]
    shown = payload(page)["queries"][0]["passages"][0]["token_scores"]
    exact = np.array(report["queries"][0]["passages"][0]["token_scores"])
    values = np.frombuffer(base64.b64decode(shown["bytes"]), np.int8) * shown["step"]
    assert np.abs(values - exact).max() <= shown["step"] * 0.501
    assert quantised([0.0, 0.0])["step"] == 1.0


def test_a_large_report_has_its_best_passages_token_by_token_in_the_json(scores: Path, tmp_path: Path) -> None:
    whole = json.loads((scores / "report.json").read_text(encoding="utf-8"))
    assert whole["whole_rank"] is None
    limit = sum(len(p["tokens"]) for q in whole["queries"] for p in q["passages"]) // 2
    write_report(scores, tmp_path, whole_below=limit)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    passages = [
        (p, o)
        for q, r in zip(found["queries"], whole["queries"], strict=True)
        for p, o in zip(q["passages"], r["passages"], strict=True)
    ]
    sizes = [sum(len(o["tokens"]) for _, o in passages if o["rank"] <= found["whole_rank"] + more) for more in (0, 1)]
    assert sizes[0] <= limit < sizes[1]
    for p, o in passages:
        assert p["score"] == o["score"]
        assert p["tokens"] == (o["tokens"] if p["rank"] <= found["whole_rank"] else [])
    assert (tmp_path / "report.html").read_bytes() == (scores / "report.html").read_bytes().replace(
        b'"whole_rank":null', b'"whole_rank":%d' % found["whole_rank"]
    )


def test_tokens_of_the_page_are_those_of_the_passage(scores: Path, report: dict[str, Any]) -> None:
    shown = payload((scores / "report.html").read_text(encoding="utf-8"))
    for query, told in zip(shown["queries"], report["queries"], strict=True):
        for p, o in zip(query["passages"], told["passages"], strict=True):
            assert p["tokens"].split(p["mark"]) == o["tokens"]


def test_a_very_large_page_warns(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=2, documents=4)
    with pytest.warns(UserWarning, match="report is large"):
        write_report(path, tmp_path / "elsewhere", warn_above=1000)
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


def test_csv_keeps_a_lone_carriage_return_in_its_cell(report: dict[str, Any]) -> None:
    passage = report["queries"][0]["passages"][0] | {"text": "one\rtwo"}
    text = csv_text([{"id": "q", "passages": [passage]}])
    assert text.startswith(",".join(CSV_COLUMNS) + "\n")
    assert pd.read_csv(io.StringIO(text, newline=""))["text"].tolist() == ["one\rtwo"]


# ---- in a notebook


def test_a_notebook_shows_the_best_passages_as_text(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=4, per_side=4, tokens=44, documents=12)
    top = pd.read_parquet(path / "top.parquet")
    top["text"] = HOSTILE + "\u202e\x1b" + top["text"]
    top["document"] = "<i>d&'\"" + top["document"]
    top.to_parquet(path / "top.parquet")
    seal(path)
    shown = Scores(path)._repr_html_()
    parts = Parts(shown)
    assert set(parts.tags) <= {x for tag in ("p", "b", "bdi", "table", "tr", "th", "td") for x in (tag, f"/{tag}")}
    assert shown.count("<tr><td>") == 4 * 3
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in shown
    assert "&lt;i&gt;d&amp;&#x27;&quot;" in shown
    assert not set(shown) & {"\u202e", "\x1b"}
    first = top[(top["query"] == "blessing") & (top["side"] == "positive") & (top["rank"] == 1)].iloc[0]
    assert f"<td>{first['score_nats']:+.3g}</td>" in shown


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
