"""The user's own records with their scores, and the corpora that are left when some are dropped."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import upriver as up
from cli_cases import assert_one_error, build, fit, trace, upriver
from text_cases import write_jsonl
from upriver.errors import ConfigError, InputError, MismatchError

RECORDS = [
    {
        "id": f"d{i}",
        "text": f"the people of state {i} " + "and the union " * (1 + i % 5),
        "year": 1900 + i,
        "note": {"a": [i, None]},
    }
    for i in range(12)
] + [{"text": "=cmd the last one has no name", "tags": ["x", 1], "year": None}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    tiny = build(root)
    return tiny._replace(corpus=write_jsonl(root / "corpus.jsonl", RECORDS))


@pytest.fixture
def call(capsys, monkeypatch, tiny):
    monkeypatch.setenv("UPRIVER_CACHE", str(tiny.root / "cache"))
    return lambda *args: upriver(capsys, monkeypatch, *args)


@pytest.fixture
def scores(tiny, call):
    out = tiny.root / "scores"
    if not (out / "manifest.json").exists():
        assert call(*fit(tiny, tiny.root / "factors")).status == 0
        assert call(*trace(tiny, out, "--unit-norm", factors=tiny.root / "factors")).status == 0
    return out


@pytest.fixture
def audited(tiny, call):
    out = tiny.root / "audit"
    if not (out / "manifest.json").exists():
        assert call("audit", tiny.model, tiny.corpus, "--out", out, "--seq-len", 16).status == 0
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def named() -> dict[str, dict]:
    return {record.get("id", f"corpus.jsonl:{i}"): record for i, record in enumerate(RECORDS, 1)}


def expected(scores) -> dict[str, np.ndarray]:
    found = up.Scores(scores)
    columns = [q["id"] for q in found.queries]
    table = found.documents()
    return dict(zip(table["document"], table[columns].to_numpy(float) / found.manifest["n_train"], strict=True))


def test_records_keep_every_field_and_get_their_scores(scores, call, tmp_path):
    out = tmp_path / "scored.jsonl"
    assert call("export", scores, "--out", out).status == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = [f"influence:{q['id']}" for q in up.Scores(scores).queries]
    assert [{name: x for name, x in row.items() if name not in names} for row in rows] == RECORDS
    values = expected(scores)
    for number, row in enumerate(rows, 1):
        of_row = values[row.get("id", f"corpus.jsonl:{number}")]
        np.testing.assert_allclose([row[name] for name in names], of_row, rtol=1e-6)


def test_parquet_and_csv_hold_the_same(scores, call, tmp_path):
    for kind in ("parquet", "csv"):
        assert call("export", scores, "--out", tmp_path / f"scored.{kind}").status == 0
    names = [f"influence:{q['id']}" for q in up.Scores(scores).queries]
    table = pq.read_table(tmp_path / "scored.parquet").to_pylist()
    with open(tmp_path / "scored.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["text"] for row in table] == [record["text"] for record in RECORDS]
    assert [row["year"] for row in table] == [record["year"] for record in RECORDS]
    for row, cell in zip(table, cells, strict=True):
        assert [row[name] for name in names] == pytest.approx([float(cell[name]) for name in names])
    assert cells[-1]["text"].startswith("'=cmd"), "a spreadsheet must not run it"


@pytest.mark.parametrize(("how", "flags"), [("keep", ()), ("drop", ()), ("drop", ("--lowest",))])
@pytest.mark.parametrize(("size", "count"), [("4", 4), ("25%", 3), ("0.25", 3)])
def test_a_filtered_corpus_holds_the_records_as_they_were(scores, call, tmp_path, how, flags, size, count):
    query = up.Scores(scores).queries[0]["id"]
    out = tmp_path / "left.jsonl"
    assert call("export", scores, "--out", out, f"--{how}", size, "--by", query, *flags).status == 0
    values = {name: x[0] for name, x in expected(scores).items()}
    chosen = set(sorted(values, key=lambda name: values[name], reverse=not flags)[:count])
    ids = [record.get("id", f"corpus.jsonl:{i}") for i, record in enumerate(RECORDS, 1)]
    left = [record for name, record in zip(ids, RECORDS, strict=True) if (name in chosen) == (how == "keep")]
    assert [json.loads(line) for line in out.read_text().splitlines()] == left


def test_what_it_is_told_wrongly_is_one_sentence(scores, call, tmp_path, tiny):
    out = tmp_path / "x.jsonl"
    for flags, parts in (
        (("--out", tmp_path / "x.xls"), ("--out", ".jsonl")),
        (("--out", out, "--keep", "0"), ("--by",)),
        (("--out", out, "--keep", "0", "--by", "nobody"), ("--by", "nobody")),
        (("--out", out, "--keep", "1", "--drop", "1"), ("exclude each other",)),
        (("--out", out, "--by", "q"), ("--keep or --drop",)),
        (("--out", scores / "x.jsonl"), ("inside another artifact",)),
        (("--out", out, "--corpus", tiny.queries), ("not those that were scored",)),
    ):
        assert_one_error(call("export", scores, *flags), 2, *parts)
        assert not out.exists()
    query = up.Scores(scores).queries[0]["id"]
    for size in ("0", "1.5", "-1", "150%", "many"):
        assert_one_error(call("export", scores, "--out", out, "--drop", size, "--by", query), 2, "--drop", size)
    out.write_text("mine")
    assert_one_error(call("export", scores, "--out", out), 2, str(out), "is there")
    assert out.read_text() == "mine"


def test_records_that_were_changed_are_refused(scores, tiny, tmp_path):
    before = tiny.corpus.read_text()
    try:
        tiny.corpus.write_text(before.replace("people", "person"))
        with pytest.raises(MismatchError, match="were changed since"):
            up.export(scores, tmp_path / "x.jsonl")
    finally:
        tiny.corpus.write_text(before)


def test_half_of_a_surrogate_pair_in_a_field_stops_no_export(scores, tiny, tmp_path, call):
    """JSON can hold it and UTF-8 cannot: JSON keeps it, CSV shows that something stood there, Parquet is refused."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [RECORDS[0] | {"mark": "\ud800"}, *RECORDS[1:]])
    out = tmp_path / "scores"
    assert call(*trace(tiny, out, factors=tiny.root / "factors", corpus=corpus)).status == 0
    for kind in ("jsonl", "csv"):
        assert call("export", out, "--out", tmp_path / f"x.{kind}").status == 0
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])["mark"] == "\ud800"
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["mark"] == "\ufffd"
    assert_one_error(call("export", out, "--out", tmp_path / "x.parquet"), 2, "Parquet", ".jsonl")


def test_parts_of_one_document_are_records_of_their_own(call, tiny, tmp_path):
    """Their sum is the document's; each has its own score, and they are dropped together."""
    records = [{"id": f"d{i // 2}", "text": f"the people of state {i}", "n": i} for i in range(6)]
    corpus, factors, scores = write_jsonl(tmp_path / "parts.jsonl", records), tmp_path / "factors", tmp_path / "scores"
    assert call(*fit(tiny, factors, corpus=corpus)).status == 0
    assert call(*trace(tiny, scores, corpus=corpus, factors=factors)).status == 0
    assert call("export", scores, "--out", tmp_path / "scored.jsonl").status == 0
    result = up.Scores(scores)
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert result.documents()["document"].tolist() == ["d0", "d1", "d2"]
    for query in result.queries:
        found = np.array([row[f"influence:{query['id']}"] for row in rows])
        scores_N = result.frame()[query["id"]].to_numpy(float)
        assert len(found) == len(scores_N) == 6
        np.testing.assert_allclose(found / found[0], scores_N / scores_N[0], rtol=1e-5)
        top = result.top(query["id"])
        assert [json.loads(x)["n"] for x in top["metadata"]] == top["sequence"].tolist()
    assert call("export", scores, "--out", tmp_path / "left.jsonl", "--drop", 1, "--by", "people").status == 0
    left = [json.loads(line)["n"] for line in (tmp_path / "left.jsonl").read_text().splitlines()]
    most = result.documents().sort_values("people")["document"].iloc[-1]
    assert left == [row["n"] for row in records if row["id"] != most]


def test_a_corpus_is_read_again_as_it_was_read(call, tiny, tmp_path):
    """By a trace that is told of factors, by verify and by export; a field of another corpus is named anew."""
    rows = [{"body": f"the people of state {i}", "text": "not this"} for i in range(6)]
    corpus, factors, scores = write_jsonl(tmp_path / "c.jsonl", rows), tmp_path / "factors", tmp_path / "scores"
    ran = call(*fit(tiny, factors, "--text-field", "body", corpus=corpus))
    assert ran.status == 0, ran.err
    assert call(*trace(tiny, scores, corpus=corpus, factors=factors)).status == 0
    assert set(up.Scores(scores).top("people")["text"]) <= {row["body"] for row in rows}
    assert call("export", scores, "--out", tmp_path / "scored.jsonl").status == 0
    assert call("verify", scores, "--top", 1, "--random", 1, "--steps", 1, "--tokens", 50).status == 0
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "the", "answer": " people"}])
    ran = call(*trace(tiny, tmp_path / "other", corpus=other, factors=factors))
    assert_one_error(ran, 2, "the field 'body' is missing", "--text-field")
    assert (
        call(*trace(tiny, tmp_path / "other", "--completion-field", "answer", corpus=other, factors=factors)).status
        == 0
    )
    run = tmp_path / "run.toml"
    run.write_text(
        f'model = "{tiny.model}"\ncorpus = "{corpus}"\nqueries = "{tiny.queries}"\nout = "{tmp_path / "run"}"\n'
        'seq_len = 16\ntext_field = "body"\n'
    )
    assert call("run", run).status == 0
    assert up.Scores(tmp_path / "run" / "scores").manifest["corpus"]["text_field"] == "body"


def test_records_in_memory_are_exported_from_their_corpus(tiny, tmp_path):
    model = up.load_model(tiny.model)
    corpus = up.Corpus.of([{"text": f"the people of state {i}", "n": i} for i in range(4)], model.tokenizer, seq_len=16)
    queries = up.Queries.read(tiny.queries, model.tokenizer)
    result = up.trace(model, corpus, queries, None, tmp_path / "scores", curvature="identity", top=2, layers="mlp")
    with pytest.raises(InputError, match="were in memory"):
        up.export(result.path, tmp_path / "out.jsonl")
    up.export(result.path, tmp_path / "out.jsonl", corpus=corpus)
    assert [json.loads(line)["n"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    result.report(tmp_path / "page.html")


def test_several_questions_choose_by_the_mean_of_their_nats(scores, call, tmp_path):
    found = up.Scores(scores)
    ids, values = [q["id"] for q in found.queries], expected(scores)
    scales = [(q["solution"] or {}).get("best_scale") or 1.0 for q in found.queries]
    mean = {name: float(np.mean(x * np.where(np.array(scales) > 0, scales, 1.0))) for name, x in values.items()}
    flags = [x for name in ids for x in ("--by", name)]
    assert call("export", scores, "--out", tmp_path / "left.jsonl", "--keep", 5, *flags).status == 0
    best = sorted(mean, key=lambda name: -mean[name])[:5]
    assert lines(tmp_path / "left.jsonl") == [record for name, record in named().items() if name in best]


def test_self_influence_of_a_trace_chooses(scores, call, tmp_path, tiny):
    """The sum over the record's sequences, of the same pass as unit-norm scores."""
    frame = up.Scores(scores).frame()
    own = frame.groupby("document")["@self"].sum()
    query = up.Scores(scores).queries[0]["id"]
    length = frame[query] / frame[f"{query}@unit"]
    ratio = (length**2 / frame["@self"]).to_numpy()  # the query's own, whatever the sequence
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert call("export", scores, "--out", tmp_path / "left.jsonl", "--drop", 3, "--by", "self_influence").status == 0
    worst = set(own.nlargest(3).index)
    assert lines(tmp_path / "left.jsonl") == [record for name, record in named().items() if name not in worst]
    plain = tmp_path / "plain"
    assert call(*trace(tiny, plain, factors=tiny.root / "factors")).status == 0
    flags = ("--out", tmp_path / "x.jsonl", "--drop", 3, "--by", "self_influence")
    assert_one_error(call("export", plain, *flags), 2, "self_influence", "--unit-norm")


@pytest.mark.parametrize("by", [None, "loss", "gradient_norm"])
def test_an_audit_is_exported_by_what_it_ranks(audited, call, tmp_path, by):
    flags = ("--by", by) if by else ()
    assert call("export", audited, "--out", tmp_path / "left.jsonl", "--drop", "25%", *flags).status == 0
    frame = up.Audit(audited).frame()
    worst = set(frame.nlargest(3, by or "suspicion")["row"])
    assert lines(tmp_path / "left.jsonl") == [record for row, record in enumerate(RECORDS) if row not in worst]


def test_an_audit_is_exported_whole_and_refuses_what_it_did_not_measure(audited, call, tmp_path):
    assert call("export", audited, "--out", tmp_path / "all.csv").status == 0
    with open(tmp_path / "all.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    loss = up.Audit(audited).frame().set_index("row")["loss"]
    assert [float(cell["loss"]) for cell in cells] == pytest.approx([loss[row] for row in range(len(RECORDS))])
    assert cells[-1]["text"].startswith("'=cmd")
    out = tmp_path / "x.jsonl"
    assert_one_error(call("export", audited, "--out", out, "--drop", 1, "--by", "harm"), 2, "'harm'", "loss")
    assert not out.exists()


def test_records_become_a_dataset(scores):
    found = up.Scores(scores)
    rows = found.to_dataset()
    assert rows["text"] == [record["text"] for record in RECORDS]
    name, values = found.queries[0]["id"], expected(scores)
    assert rows[0][f"influence:{name}"] == pytest.approx(values["d0"][0], rel=1e-6)
    assert found.to_dataset("sequences")[name] == found.frame()[name].tolist()
    assert found.to_dataset("documents")["document"] == found.documents()["document"].tolist()
    with pytest.raises(ConfigError, match="no such rows"):
        found.to_dataset("pages")
