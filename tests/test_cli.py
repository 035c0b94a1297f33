"""The happy path through the command line: fit, trace, report, run; files, columns and numbers as docs/formats.md promises."""

import json
import re
import shutil
import sys
import webbrowser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from typer.main import get_command

import cli_cases
from cli_cases import QUERIES, RECORDS, Tiny, upriver
from text_cases import write_jsonl
from upriver import cli
from upriver.given import read_for_others
from upriver.model.load import load_model
from upriver.runtime.artifact import read_json

FORMATS = Path(__file__).parent.parent / "docs" / "formats.md"
SEQ_LEN, TOP = 16, 4
ASKED = [*QUERIES, {"id": "own", "prompt": "the state of the"}]  # the last one is for --complete
IDS = [query["id"] for query in ASKED]
SHARE = "layers: tracked 9,216 of 26,848 parameters (34.3%); not: "  # 6 of 32 x 48; besides 8 of 32 x 32, 290 + 5 of 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    made = cli_cases.build(tmp_path_factory.mktemp("tiny"))
    write_jsonl(made.queries, ASKED)
    return made


@pytest.fixture(autouse=True)
def cache(tiny, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tiny.root / "cache"))


@pytest.fixture
def call(capsys, monkeypatch):
    return lambda *args: upriver(capsys, monkeypatch, *args)


def fit(tiny: Tiny, out, *flags):
    return ["fit", tiny.model, tiny.corpus, "--out", out, "--seq-len", SEQ_LEN, *flags]


def trace(tiny: Tiny, out, *flags, factors=None):
    inputs = [tiny.model, tiny.corpus, tiny.queries, "--factors", factors or tiny.factors]
    return ["trace", *inputs, "--out", out, "--top", TOP, "--complete", 3, *flags]


@pytest.fixture(scope="module")
def scores(tiny):
    """The results of one fit and one trace, with per-layer scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPRIVER_CACHE", str(tiny.root / "cache"))
        for args in (fit(tiny, tiny.factors), trace(tiny, tiny.root / "scores", "--layer-scores")):
            patch.setattr(sys, "argv", ["upriver", *map(str, args)])
            cli.main()
    return tiny.root / "scores"


@pytest.fixture(scope="module")
def manifest(scores):
    return json.loads((scores / "manifest.json").read_text())


@pytest.fixture(scope="module")
def table(scores):
    return pd.read_parquet(scores / "scores.parquet")


@pytest.fixture(scope="module")
def top(scores):
    return pd.read_parquet(scores / "top.parquet")


def sides(top):
    return [frame for _, frame in top.groupby(["query", "side"], sort=False)]


# ------------------------------------------------------------------------------------------------------- what is printed


def said(ran, start: str) -> list[str]:
    return [line for line in ran.err.splitlines() if line.startswith(start)]


def test_each_verb_names_the_next(tiny, scores, tmp_path, call, monkeypatch):
    fitted = call(*fit(tiny, tmp_path / "factors"))
    assert (fitted.status, fitted.out) == (0, "")
    assert (
        f"next: upriver trace {tiny.model} {tiny.corpus} QUERIES --factors {tmp_path / 'factors'}" in fitted.last_line
    )
    assert SHARE in fitted.err
    again = call(*fit(tiny, tmp_path / "factors"))
    for start in ("layers: ", "convergence: "):
        assert said(again, start) == said(fitted, start) != []
    traced = call(*trace(tiny, tmp_path / "scores", factors=tmp_path / "factors"))
    assert traced.last_line == f"next: upriver report {tmp_path / 'scores'} --open"
    assert SHARE in traced.err
    assert "Positive means" in traced.out
    for query in ASKED:
        assert query["prompt"] in traced.out
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    told = call("report", tmp_path / "scores", "--open")
    assert told.last_line == f"report: {tmp_path / 'scores' / 'report.html'}"
    assert opened == [(tmp_path / "scores" / "report.html").as_uri()]


def test_the_same_command_again_uses_what_is_there(tiny, scores, call):
    before = {p: p.stat().st_mtime_ns for p in scores.rglob("*") if p.is_file() and p.name != ".lock"}
    for args in (fit(tiny, tiny.factors), trace(tiny, scores, "--layer-scores")):
        again = call(*args)
        assert "used as it is" in again.err
        assert SHARE in again.err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_skipped_record_is_listed_by_fit_and_trace(tiny, tmp_path, call):
    bad = write_jsonl(tmp_path / "c.jsonl", [*RECORDS, {"text": ""}])
    other = tiny._replace(corpus=bad)
    for args in (
        fit(other, tmp_path / "factors", "--on-bad-record", "skip"),
        trace(other, tmp_path / "scores", factors=tmp_path / "factors"),
    ):
        ran = call(*args)
        assert ran.status == 0, ran.err
        assert "skipped 1 bad records" in ran.err
        assert f"{bad}:7: the field 'text' is empty" in ran.err


def test_a_plan_leaves_out_what_reading_the_corpus_left(tiny, tmp_path):
    """The fit after it finds the tokens made, as a second plan does."""
    model, sizes = load_model(str(tiny.model)), iter([10**9, 10**9 + 5, 10**9])
    corpus = write_jsonl(tmp_path / "new.jsonl", [*RECORDS, {"text": "we the people of this test"}])
    left = [read_for_others(str(corpus), model, 16, None, lambda: next(sizes))[1] for _ in range(2)]
    assert left == [5, 0]


VERBS = {"fit": 2, "trace": 3, "plan": 2, "report": 1, "verify": 1, "run": 1, "demo": 0}


def test_draws_and_unit_norm_scores_go_by_their_flags(tiny, tmp_path, call):
    assert call(*fit(tiny, tmp_path / "factors", "--draws", "2")).status == 0
    ran = call(*trace(tiny, tmp_path / "scores", "--unit-norm", factors=tmp_path / "factors"))
    assert ran.status == 0, ran.err
    table = pd.read_parquet(tmp_path / "scores" / "scores.parquet")
    units = table[[name for name in table if name.endswith("@unit")]]
    assert units.shape[1] == len(ASKED)
    assert 0 < units.abs().max().max() <= 1
    assert json.loads((tmp_path / "scores" / "manifest.json").read_text())["fisher"]["draws"] == 2
    assert call("report", tmp_path / "scores").status == 0
    ran = call("plan", tiny.model, tiny.corpus, "--queries", "0", "--seq-len", "16", "--draws", "3")
    assert "3 x " in ran.out, ran.err


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_complete_and_short(call, verb):
    parameters = get_command(cli.app).commands[verb].params  # pyright: ignore
    flags = [p for p in parameters if p.param_type_name == "option"]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    assert len(flags) <= 40
    assert len(arguments) == VERBS[verb]
    assert all(p.help and p.help.endswith(".") for p in parameters)
    ran = call(verb, "--help")
    assert ran.status == 0
    assert ran.out.startswith(f"Usage: upriver {verb} [OPTIONS]")
    for p in parameters:
        name = p.metavar if p in arguments else p.opts[0]
        assert name in ran.out


def test_without_a_verb_the_verbs_are_listed(call):
    for ran in (call(), call("--help")):
        assert ran.status == 0
        assert all(f"\n  {verb} " in ran.out for verb in VERBS)


# ------------------------------------------------------------------------------------------------------- FACTORS


def test_factors_folder(tiny, scores):
    manifest = json.loads((tiny.factors / "manifest.json").read_text())
    assert {"key", "layers", "coverage", "fit", "data", "timings"} <= manifest.keys()
    assert manifest["key"] == read_json(tiny.factors / "key.json")
    assert {"stage", "model", "corpus", "kernel", "options", "conventions"} <= manifest["key"].keys()
    assert not (tiny.factors / "covariance").exists()
    for k, layer in enumerate(manifest["layers"]):
        O, I = layer["shape"]
        with safe_open(tiny.factors / "eigen" / f"unit-{k:06d}.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert shapes["Q_S"] == [O, O]
        assert shapes["eig_S"] == [O]
        own = layer["A_of"] == layer["name"]
        assert (shapes.get("Q_A"), shapes.get("eig_A")) == (([I, I], [I]) if own else (None, None))
        with safe_open(tiny.factors / "correction" / "lam.safetensors", "np") as file:
            assert file.get_slice(layer["name"]).get_shape() == [O, I]
    assert [x["A_of"] for x in manifest["layers"] if x["kind"] == "up_proj"] == [
        f"model.layers.{n}.mlp.gate_proj" for n in (0, 1)
    ]


# ------------------------------------------------------------------------------------------------------- SCORES


def test_scores_table(scores, table, manifest):
    assert list(table.columns) == ["sequence", "document", "part", "start", "end", *IDS]
    schema = pq.read_schema(scores / "scores.parquet")
    assert {str(schema.field(name).type) for name in ("sequence", "start", "end")} == {"int64"}
    assert {str(schema.field(name).type) for name in IDS} == {"float"}
    assert "string" in str(schema.field("document").type)
    assert table["sequence"].tolist() == list(range(manifest["n_train"]))
    assert np.isfinite(table[IDS].to_numpy()).all()
    texts = {r["id"]: r.get("text") or r["prompt"] + r["completion"] for r in RECORDS}
    for name, rows in table.groupby("document", sort=False):  # the windows are the document, in order
        assert rows["start"].tolist() == [0, *rows["end"].tolist()[:-1]]
        assert len(texts[name]) - rows["end"].iloc[-1] in (0, 1)  # a last window of one token predicts nothing


def test_documents_are_sums(scores, table):
    documents = pd.read_parquet(scores / "documents.parquet")
    assert list(documents.columns) == ["document", "sequences", *IDS]
    groups = table.groupby("document", sort=False)
    assert documents["document"].tolist() == list(groups.groups)
    assert documents["sequences"].tolist() == groups.size().tolist()
    np.testing.assert_allclose(documents[IDS], groups[IDS].sum(), rtol=1e-5, atol=1e-4)


def test_layer_scores_sum_to_the_scores(scores, table, manifest):
    layers_NQL = np.load(scores / "layers.npy")
    assert layers_NQL.dtype == np.float32
    assert layers_NQL.shape == (len(table), len(IDS), len(manifest["layers"]))
    np.testing.assert_allclose(layers_NQL.sum(2), table[IDS], rtol=1e-4, atol=1e-3)


def test_the_docs_name_the_columns_of_the_top(top):
    part = FORMATS.read_text().split("`top.parquet`:")[1].split("`layers.npy`")[0]
    cells = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(top.columns)


def test_top_rows(top, table, manifest):
    for frame in sides(top):
        sign = 1 if frame["side"].iloc[0] == "positive" else -1
        assert frame["rank"].tolist() == list(range(1, len(frame) + 1))
        assert (frame["score"] * sign > 0).all()
        assert (np.diff(frame["score"] * sign) <= 0).all()
        assert len(frame) <= TOP
    assert top["rescored"].all()
    np.testing.assert_allclose(top["score_nats"], top["score"] / manifest["n_train"], rtol=1e-6)
    scan = [table.loc[table["sequence"] == row.sequence, row.query].item() for row in top.itertuples()]
    np.testing.assert_array_equal(top["scan_score"], np.float32(scan))
    np.testing.assert_allclose(top["score"], scan, rtol=1e-3, atol=1e-2)  # rank 32 is full rank here


def test_the_parts_of_a_top_row_sum_to_its_score(top, manifest):
    for row in top.itertuples():
        scale = np.abs(row.token_scores).sum()
        assert row.token_scores.sum() == pytest.approx(row.score, abs=1e-5 * float(scale))
        assert row.layers.sum() == pytest.approx(row.score, abs=1e-5 * float(np.abs(row.layers).sum()))
        assert len(row.layers) == len(manifest["layers"])
        assert len(row.tokens) == len(row.token_scores)
        assert row.spurious == (np.linalg.norm(row.token_scores) / scale > 2 / 3)


def test_the_text_of_a_top_row_is_that_of_its_document(top):
    records = {r["id"]: r for r in RECORDS}
    for row in top.itertuples():
        record = records[row.document]
        text = record.get("text") or record["prompt"] + record["completion"]
        assert row.text == text[row.start : row.end]
        assert "".join(row.tokens) == row.text
        assert json.loads(row.metadata) == ({"year": 1787} if row.document == "union" else {})
        assert 0 <= row.overlap <= 1
        assert row.tfidf_rank >= 1


def test_queries_file(scores):
    people, peace, own = json.loads((scores / "queries.json").read_text())
    assert [people["id"], peace["id"], own["id"]] == IDS
    assert (people["prompt"], people["completion"], people["contrast"]) == ("we the", " people", None)
    assert [q["generated"] for q in (people, peace, own)] == [False, False, True]
    for q in (people, peace, own):
        tokens, against = q["completion_tokens"], q["contrast_tokens"] or []
        assert "".join(t["text"] for t in tokens) == q["completion"]
        total = sum(t["log_prob"] for t in tokens) - sum(t["log_prob"] for t in against)
        assert q["measurement"] == pytest.approx(total, abs=1e-4)
        assert q["log_prob"] == pytest.approx(total, abs=1e-4)
    assert "".join(t["text"] for t in peace["contrast_tokens"]) == peace["contrast"] == " union"
    assert 1 <= len(own["completion_tokens"]) <= 3


def test_manifest_says_how_it_was_made(tiny, scores, manifest):
    for name in (
        "upriver", "stage", "key", "model", "tokenizer", "corpus", "n_train", "scored_sequences", "candidates", "coverage",
        "layers", "curvature", "damping", "fisher", "fit", "rank", "rank_error", "top", "kernel", "checks", "conventions", "sign",
        "versions", "timings",
    ):  # fmt: skip
        assert name in manifest, name
    assert (manifest["stage"], manifest["n_train"], manifest["scored_sequences"]) == ("trace", 16, 16)
    assert {"stage", "model", "corpus", "queries", "factors", "options", "conventions"} <= manifest["key"].keys()
    assert manifest["key"]["options"]["damping"] == manifest["damping"] == "0.1x"
    assert (manifest["rank"], manifest["top"], manifest["curvature"]) == (32, TOP, "ekfac")
    assert (manifest["model"]["dtype"], manifest["kernel"]) == ("float32", "sdpa")
    assert manifest["fisher"] == {"labels": "sampled", "draws": 1, "seed": 0}
    assert (manifest["coverage"]["tracked"], manifest["coverage"]["total"]) == (9216, 26848)
    assert manifest["corpus"]["documents"] == len(RECORDS)
    assert (manifest["corpus"]["seq_len"], manifest["corpus"]["pack"]) == (SEQ_LEN, False)
    assert manifest["checks"]["token_sum"] < 1e-4
    assert manifest["rank_error"]["worst"] > 0.999
    assert {"torch", "transformers", "numpy", "python"} <= manifest["versions"].keys()
    assert {"queries", "scan", "rescore"} <= manifest["timings"].keys()


# ------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("curvature", ["diagonal", "identity"])
def test_full_rank_is_what_a_rank_of_the_whole_width_gives(tiny, scores, tmp_path, call, curvature):
    tables = []
    for rank in ("full", 32):
        out = tmp_path / str(rank)
        ran = call(*trace(tiny, out, "--curvature", curvature, "--rank", rank))
        assert ran.status == 0, ran.err
        tables.append(pd.read_parquet(out / "scores.parquet")[IDS].to_numpy())
        told = json.loads((out / "manifest.json").read_text())
        assert told["damping"] == ("none" if curvature == "identity" else "0.1x")
        assert (told["curvature"], told["rank"]) == (curvature, rank)
        assert not (out / "layers.npy").exists()
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-4 * np.abs(tables[0]).max())


def test_candidates_are_scored_as_in_the_whole(tiny, scores, table, tmp_path, call):
    ran = call(*trace(tiny, tmp_path / "out", "--candidates", 2))
    assert ran.status == 0, ran.err
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    some = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert told["candidates"]["per_query"] == 2
    assert told["candidates"]["kept"] == told["scored_sequences"] == len(some) < len(table) == told["n_train"]
    same = table[table["sequence"].isin(some["sequence"])]
    np.testing.assert_allclose(some[IDS], same[IDS], rtol=1e-4, atol=1e-3)
    top = pd.read_parquet(tmp_path / "out" / "top.parquet")  # nats are a share of all that the model was trained on
    np.testing.assert_allclose(top["score_nats"], top["score"] / told["n_train"], rtol=1e-6)


def test_bfloat16_fit_and_trace(tiny, scores, table, tmp_path, call):
    assert (
        call(*fit(tiny, tmp_path / "factors", "--dtype", "bfloat16", "--fisher", "empirical", "--layers", "all")).status
        == 0
    )
    assert call(*fit(tiny, tmp_path / "half", "--dtype", "bfloat16")).status == 0
    ran = call(*trace(tiny, tmp_path / "out", factors=tmp_path / "half"))
    assert ran.status == 0, ran.err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]["dtype"] == "bfloat16"
    half = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    for name in IDS[:2]:  # the third query's answer may differ
        assert np.corrcoef(half[name], table[name])[0, 1] > 0.95


def test_pack_and_other_layers(tiny, tmp_path, call):
    factors = tmp_path / "factors"
    assert call(*fit(tiny, factors, "--pack", "--layers", "attention, *.down_proj", "--max-tokens", 100)).status == 0
    ran = call(*trace(tiny, tmp_path / "out", factors=factors))
    assert ran.status == 0, ran.err
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {x["kind"] for x in told["layers"]} == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert told["corpus"]["pack"] is True
    assert told["fit"]["tokens"] <= 100


# ------------------------------------------------------------------------------------------------------- report, run


def test_report_files(scores, tmp_path, call):
    assert call("report", scores, "--out", tmp_path / "page").status == 0
    assert sorted(p.name for p in (tmp_path / "page").iterdir()) == [
        "report.html", "report.json", "report.jsonl", "top.csv",
    ]  # fmt: skip
    data = json.loads((tmp_path / "page" / "report.json").read_text())
    assert [q["id"] for q in data["queries"]] == IDS
    page = (tmp_path / "page" / "report.html").read_text()
    assert "<script>alert" not in page


def test_run_does_all_four(tiny, scores, table, tmp_path, call):
    lines = {"model": tiny.model, "corpus": tiny.corpus, "queries": tiny.queries, "out": tmp_path / "out"}
    text = "".join(f'{name} = "{value}"\n' for name, value in lines.items())
    verify = "verify = { top = 1, random = 2, tokens = 64, steps = 2 }\n"
    (tmp_path / "run.toml").write_text(
        text + f"seq_len = {SEQ_LEN}\ntop = {TOP}\ncomplete = 3\nlayer_scores = true\n" + verify
    )
    for again in range(2):
        ran = call("run", tmp_path / "run.toml")
        assert ran.status == 0, ran.err
        assert ran.last_line == f"report: {tmp_path / 'out' / 'report.html'}"
        assert ran.err.count("used as it is") == 3 * again
        assert "predicted against realised" in ran.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "factors", "report.html", "report.json", "report.jsonl", "scores", "top.csv",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "scores" / "scores.parquet"), table)
    verified = pd.read_parquet(tmp_path / "out" / "scores" / "verify.parquet")
    assert verified["shown"].value_counts().to_dict() == {True: 2 * len(IDS), False: 2 * len(IDS)}
    shown = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "realised_nats" in json.dumps(shown), "the page has it"


def test_overwrite_makes_the_same_again(tiny, scores, table, tmp_path, call):
    shutil.copytree(scores, tmp_path / "out")
    ran = call(*trace(tiny, tmp_path / "out", "--layer-scores", "--overwrite"))
    assert ran.status == 0, ran.err
    assert "used as it is" not in ran.err
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "scores.parquet"), table)
