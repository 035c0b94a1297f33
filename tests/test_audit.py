"""Self-influence against the definition written out; what is planted is found; what an audit writes, and what it refuses."""

import html
import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import cli_cases
import upriver as up
from cases import CASES, case, close, gradients, truth
from text_cases import write_jsonl
from upriver.errors import ConfigError, CorpusError, InputError, MismatchError, ModelError
from upriver.influence.self_influence import COLUMNS, block_options, measured
from upriver.model.planned import division_file
from upriver.runtime.artifact import Artifact, read_json, write_json
from upriver.runtime.config import TraceOptions, options
from upriver.runtime.cost import SELF_INFLUENCE, LayerSize, Shape
from upriver.runtime.divide import Budget, divide_pass

STUDY = Path(__file__).parent.parent / "studies" / "audit" / "study.py"
DIGITS_EPOCHS, RECORDS_EPOCHS = 30, 40
KINDS = ("ekfac", "kfac", "diagonal", "identity")


def expected(name: str, kind: str) -> torch.Tensor:
    """``sum over layers g^T (G + lambda I)^-1 g``, loss and norm of the gradient of each, by dense solves: ``[N, 3]``."""
    c, t, out = case(name), truth(name), []
    for row, G in enumerate(gradients(name)):
        own = sum((g * t.curvature(kind, x).solve(g, damping(t, kind, x))).sum() for x, g in G.items())
        norm = sum((g**2).sum() for g in G.values()) ** 0.5
        out.append(torch.stack([own, c.loss(row)(c.model.module).detach(), norm]))
    return torch.stack(out)


def damping(t, kind: str, x: str) -> float:
    return 0.0 if kind == "identity" else 0.1 * float(t.curvature(kind, x).lam.mean())


def table(name: str, kind: str, fitted, **how) -> torch.Tensor:
    c, factors = case(name), fitted(name)
    given = {"curvature": kind, "dtype": "float64", "batch_tokens": 30, **how}
    frame = up.self_influence(c.model, c.data, factors, **given)
    assert tuple(frame.columns) == COLUMNS
    return torch.tensor(frame.to_numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_self_influence_is_the_dense_quadratic_form(name, kind, fitted):
    for found, wanted in zip(table(name, kind, fitted).T, expected(name, kind).T, strict=True):
        close(found, wanted, 1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "classifier"])
def test_groups_batches_and_units_change_nothing(name, fitted, tmp_path):
    whole = table(name, "ekfac", fitted)
    close(table(name, "ekfac", fitted, batch_tokens=7), whole, 1e-12)
    close(table(name, "ekfac", fitted, unit_tokens=9), whole, 1e-12)
    c, factors, stage = case(name), fitted(name), Artifact.open(tmp_path, "self", {})
    opts = block_options(options(TraceOptions, {"dtype": "float64", "batch_tokens": 30}), c.model, factors)
    measured(stage, c.model, c.data, factors, opts)
    division = read_json(division_file(tmp_path))
    division["groups"] = {"self-influence": [[i] for i in range(len(c.layers))]}
    write_json(division_file(tmp_path), division)
    apart = measured(stage, c.model, c.data, factors, opts)
    assert len(list(tmp_path.glob("self/layers-*"))) == 1 + len(c.layers)
    close(torch.tensor(apart.to_numpy()), whole, 1e-12)


def test_a_small_memory_divides_the_layers():
    layers = tuple(LayerSize(f"{i}", 1024, 1024, f"{i}", i) for i in range(8))
    shape = Shape(layers, (), 0, 0, 1, False, 8 << 20, 64, 1024, 0)
    budget = Budget(10**9, 0, 1024, 64)
    most = divide_pass(shape, SELF_INFLUENCE, budget)
    assert most.groups["self-influence"] == [list(range(8))]
    assert most.peak["self-influence"] < 10**9
    less = divide_pass(shape, SELF_INFLUENCE, budget._replace(limit=most.peak["self-influence"] - 20_000_000))
    assert len(less.groups["self-influence"]) > 1
    with pytest.raises(ConfigError, match="the memory is too small for this pass"):
        divide_pass(shape, SELF_INFLUENCE, budget._replace(limit=180_000_000))


class Weighted(up.Classification):
    """Another loss; the losses of single examples that it inherits are not its own."""

    def loss(self, module, batch, sampler=None):
        return 3.0 * super().loss(module, batch, sampler)


def test_a_task_that_does_not_tell_single_losses_is_asked_one_by_one(tmp_path):
    c = case("classifier")
    plain = up.self_influence(c.model, c.data, curvature="identity", layers="*", dtype="float64")
    other = up.Model(c.model.module, task=Weighted())
    said = []
    found = up.self_influence(other, c.data, curvature="identity", layers="*", dtype="float64", say=said.append)
    np.testing.assert_allclose(found["loss"], 3 * plain["loss"], rtol=1e-12)
    np.testing.assert_allclose(found["self_influence"], 9 * plain["self_influence"], rtol=1e-12)
    assert any("one sequence at a time" in line for line in said)


# ---- what is planted is found


def test_flipped_labels_of_digits_are_found(study, tmp_path):
    found = study.digits(0, tmp_path, train=1000, epochs=DIGITS_EPOCHS)
    measures = study.found(found, tmp_path, say=lambda line: None)
    shares = {name: study.recall(score, found.planted, 0.15) for name, score in measures.items()}
    assert max(shares.values()) >= 0.85, shares
    assert shares["self_influence (ekfac)"] >= 0.8, shares
    assert min(shares["loss"], shares["gradient_norm"]) > 0.5, shares  # chance is .15
    assert study.recall(np.random.default_rng(0).random(1000), found.planted, 0.15) < 0.3


def test_wrong_answers_among_records_are_found(study, tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    found = study.records(tmp_path, people=5, epochs=RECORDS_EPOCHS)
    result = up.audit(found.model, found.data, tmp_path / "audit", queries=found.failed)
    frame = result.frame().set_index("row").sort_index()
    shares = {name: study.recall(frame[name].to_numpy(), found.planted, 0.15) for name in study.MEASURES}
    assert len(frame) == len(found.planted) == 200
    assert max(shares.values()) >= 0.8, shares


# ---- the folder


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return cli_cases.build(tmp_path)


def run(tiny, capsys, monkeypatch, *flags, data=None, out="audit"):
    args = ["audit", tiny.model, data or tiny.corpus, "--out", tiny.root / out, "--seq-len", 16, *flags]
    return cli_cases.upriver(capsys, monkeypatch, *args)


def test_the_command_ranks_the_records(tiny, capsys, monkeypatch):
    ran = run(tiny, capsys, monkeypatch, "--queries", tiny.queries, "--top", 3)
    assert ran.status == 0, ran.err
    frame = up.Audit(tiny.root / "audit").frame()
    assert frame.columns.tolist() == ["row", "suspicion", "self_influence", "loss", "gradient_norm", "harm"]
    assert sorted(frame["row"]) == list(range(len(cli_cases.RECORDS)))
    assert frame["suspicion"].is_monotonic_decreasing
    assert frame["suspicion"].iloc[0] == 1
    lines = [json.loads(line) for line in (tiny.root / "audit" / "records.jsonl").read_text().splitlines()]
    by_row = frame.set_index("row")
    for row, (line, record) in enumerate(zip(lines, cli_cases.RECORDS, strict=True)):
        assert {name: line[name] for name in record} == record  # as it was, in its place
        assert line["suspicion"] == pytest.approx(by_row.loc[row, "suspicion"])
        assert line["harm"] == pytest.approx(by_row.loc[row, "harm"])
    scores = up.Scores(tiny.root / "audit" / "scores").documents().set_index("document")
    ids = [r["id"] for r in cli_cases.RECORDS]
    harm = -scores.loc[ids, ["people", "peace"]].mean(axis=1).to_numpy()
    np.testing.assert_allclose(by_row.sort_index()["harm"], harm, rtol=1e-4)
    assert "suspicion" in ran.out
    with pytest.raises(InputError, match=r"an audit is no trace: .*audit.html, its trace, if any, .*scores"):
        up.report(tiny.root / "audit")


def test_the_page_shows_texts_and_runs_none_of_them(tiny, capsys, monkeypatch):
    assert run(tiny, capsys, monkeypatch).status == 0
    page = (tiny.root / "audit" / "audit.html").read_text()
    assert "<script>alert" not in page
    assert html.escape("<script>alert('x')</script>", quote=False).replace("'", "&#39;") in page
    assert len(re.findall(r"<script", page)) == 1
    assert page.count("<tr>") == 1 + len(cli_cases.RECORDS)
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_a_record_of_several_windows_is_one_row(tiny):
    model = up.load_model(tiny.model)
    corpus = up.Corpus.read(tiny.corpus, model.tokenizer, seq_len=16)
    factors = up.fit(model, corpus, "factors")
    table = up.self_influence(model, corpus, factors)
    frame = up.audit(model, corpus, "audit", factors=factors).frame().set_index("row").sort_index()
    assert len(corpus) > len(frame)
    for row in range(len(frame)):
        own = table[np.asarray(corpus.document_of_N) == row]
        assert frame.loc[row, "self_influence"] == pytest.approx(own["self_influence"].sum())
        assert frame.loc[row, "loss"] == pytest.approx(own["loss"].sum())
        assert frame.loc[row, "gradient_norm"] == pytest.approx(np.linalg.norm(own["gradient_norm"]))


def test_parquet_stays_parquet_and_fields_of_the_user_stay_theirs(tiny):
    rows = [{"text": r["text"], "loss": n, "tags": ["a"] * n} for n, r in enumerate(cli_cases.RECORDS) if "text" in r]
    pq.write_table(pa.Table.from_pylist(rows), tiny.root / "corpus.parquet")
    model = up.load_model(tiny.model)
    corpus = up.Corpus.read(tiny.root / "corpus.parquet", model.tokenizer, seq_len=16)
    frame = up.audit(model, corpus, "audit", curvature="identity").frame().set_index("row").sort_index()
    records = pq.read_table("audit/records.parquet").to_pylist()
    assert [{name: record[name] for name in rows[0]} for record in records] == rows
    np.testing.assert_allclose([record["audit_loss"] for record in records], frame["loss"])
    np.testing.assert_allclose([record["suspicion"] for record in records], frame["suspicion"])
    assert frame["self_influence"].to_numpy() == pytest.approx(frame["gradient_norm"].to_numpy() ** 2)


def test_an_audit_goes_on_and_replaces_only_what_is_ours(tiny):
    model = up.load_model(tiny.model)
    corpus = up.Corpus.read(tiny.corpus, model.tokenizer, seq_len=16)
    factors = up.fit(model, corpus, "factors")
    whole = up.audit(model, corpus, "whole", factors=factors, unit_tokens=20, batch_tokens=16).frame()
    tokens = []

    @contextmanager
    def stops(name, total):
        def advance(done):
            tokens.append(done)
            if len(tokens) == 4:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        up.audit(model, corpus, "audit", factors=factors, unit_tokens=20, batch_tokens=16, progress=stops)
    assert list(Path("audit/self").rglob("unit-*"))
    left = []

    @contextmanager
    def noted(name, total):
        left.append(total)
        yield lambda done: None

    found = up.audit(model, corpus, "audit", factors=factors, unit_tokens=20, batch_tokens=16, progress=noted)
    assert 0 < left[0] < corpus.n_tokens  # what was committed is not computed again
    pd.testing.assert_frame_equal(found.frame(), whole)
    assert not Path("audit/self").exists()
    with pytest.raises(MismatchError, match=r"made with another options\.by"):
        up.audit(model, corpus, "audit", factors=factors, by="gradient_norm", unit_tokens=20, batch_tokens=16)
    up.audit(model, corpus, "audit", factors=factors, by="gradient_norm", overwrite=True)
    Path("audit/mine.txt").write_text("keep")
    with pytest.raises(MismatchError, match=r"mine\.txt"):
        up.audit(model, corpus, "audit", factors=factors, by="self_influence", overwrite=True)
    assert Path("audit/mine.txt").read_text() == "keep"


def test_an_audit_with_a_fit_and_a_trace_of_its_own_is_replaced_whole(tiny):
    model = up.load_model(tiny.model)
    corpus = up.Corpus.read(tiny.corpus, model.tokenizer, seq_len=16)
    queries = up.Queries.read(tiny.queries)
    first = up.audit(model, corpus, "audit", queries=queries)
    up.Scores("audit/scores").report()
    again = up.audit(model, corpus, "audit", queries=queries)  # used as it is
    pd.testing.assert_frame_equal(first.frame(), again.frame())
    up.audit(model, corpus, "audit", by="harm", queries=queries, overwrite=True)
    assert up.Audit("audit").manifest["audit"]["by"] == "harm"
    Path("audit/audit.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="checksum"):
        up.Audit("audit").frame()


# ---- labelled arrays, and what is refused


def test_arrays_as_scikit_learn_takes_them(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 16)), rng.integers(0, 3, 60).astype(np.uint8)
    model = up.Model(nn.Sequential(nn.Linear(16, 3)), task=up.Classification())
    found = up.audit(model, (x, y), tmp_path / "audit", queries=(x[:4], y[:4]), top=5)
    frame = found.frame()
    assert len(frame) == 60
    assert frame["harm"].notna().all()
    same = up.audit(
        model,
        up.Examples({"x": torch.tensor(x), "y": torch.tensor(y, dtype=torch.int64)}),
        tmp_path / "same",
        by="loss",
        curvature="identity",
    )
    pd.testing.assert_series_equal(
        frame.sort_values("row")["loss"], same.frame().sort_values("row")["loss"], check_index=False
    )
    assert same.frame()["loss"].is_monotonic_decreasing
    page = found.page.read_text()
    assert page.count('src="data:image/png') == 5
    assert "model" in page


@pytest.mark.parametrize(
    ("given", "how", "error", "sentence"),
    [
        ((np.zeros((3, 2)), np.array(["a", "b", "c"])), {}, CorpusError, "encode labels as whole numbers"),
        ((np.full((3, 2), np.nan), np.zeros(3, int)), {}, CorpusError, "a NaN or an infinity"),
        ((np.zeros((3, 2)), np.zeros(4, int)), {}, CorpusError, "one and the same length"),
        ((np.zeros((3, 2)), np.array([0, 1, 7])), {}, ModelError, "classes are from 0 to 1, .*: got 7 in 'y'"),
        ((np.zeros((3, 2)), np.array([0.0, 1.0, 0.5])), {}, ModelError, "whole numbers from 0: got 'y' of torch.float"),
        ([1, 2, 3], {}, CorpusError, "not examples: got list"),
        ((np.zeros((3, 2)), np.zeros(3, int)), {"by": "harm"}, ConfigError, "no queries"),
        ((np.zeros((3, 2)), np.zeros(3, int)), {"by": "los"}, ConfigError, "bad value for 'by'"),
        ((np.zeros((3, 2)), np.zeros(3, int)), {"damping": "0.1x,0.01x"}, ConfigError, "one damping"),
        ((np.zeros((3, 2)), np.zeros(3, int)), {"damping": "x"}, ConfigError, "damping"),
        ((np.zeros((3, 2)), np.zeros(3, int)), {"rank": 0}, ConfigError, "rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_audited_is_refused_in_a_sentence(given, how, error, sentence, tmp_path):
    model = up.Model(nn.Sequential(nn.Linear(2, 2)), task=up.Classification())
    with pytest.raises(error, match=sentence):
        up.audit(model, given, tmp_path / "audit", **how)
    assert not (tmp_path / "audit" / "audit.parquet").exists()


@pytest.mark.parametrize("bare", [True, False])
def test_a_network_without_its_task_is_refused_in_a_sentence(bare, tmp_path):
    net: Any = nn.Sequential(nn.Linear(2, 2))
    given = (np.zeros((3, 2)), np.zeros(3, int))
    with pytest.raises(ModelError, match=r"give up.Model\(module, task="):
        up.audit(net if bare else up.Model(net), given, tmp_path)
    with pytest.raises(ModelError, match=r"give up.Model\(module, task="):
        up.fit(
            net if bare else up.Model(net), up.Examples({"x": torch.zeros(3, 2), "y": torch.zeros(3).long()}), tmp_path
        )


def test_other_curvatures_have_no_self_influence():
    c = case("classifier")
    with pytest.raises(ConfigError, match="got 'cg'; give ekfac, kfac, diagonal, identity"):
        up.self_influence(c.model, c.data, curvature="cg", layers="*")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--by", "harm"], ["no queries", "--queries"]),
        (["--by", "size"], ["bad value for 'by'", "size"]),
        (["--queries", "missing.jsonl"], ["missing.jsonl"]),
        (["--curvature", "cg"], ["curvature", "cg"]),
        (["--factors", "nowhere"], ["no such folder of factors"]),
    ],
)
def test_the_command_refuses_in_a_sentence(flags, parts, tiny, capsys, monkeypatch):
    cli_cases.assert_one_error(run(tiny, capsys, monkeypatch, *flags), 2, *parts)


def test_records_that_change_under_the_audit_are_refused(tiny):
    model = up.load_model(tiny.model)
    corpus = up.Corpus.read(tiny.corpus, model.tokenizer, seq_len=16)
    write_jsonl(tiny.corpus, cli_cases.RECORDS[1:])
    with pytest.raises(CorpusError, match="the corpus changed since it was read"):
        up.audit(model, corpus, "audit", curvature="identity")


def test_a_packed_corpus_is_refused(tiny):
    model = up.load_model(tiny.model)
    corpus = up.Corpus.read(tiny.corpus, model.tokenizer, seq_len=16, pack=True)
    with pytest.raises(CorpusError, match="packed"):
        up.audit(model, corpus, "audit")
