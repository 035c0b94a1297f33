"""What a verification measures, against the dense solution, the proximal Bregman optimum and autograd; what it refuses; the page.

Axes: N sequences, Q queries, P tracked parameters.
"""

import json
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

import cli_cases
import upriver as up
from cases import case
from report_fixture import payload
from test_trace_solvers import dense_scores, flat, matrix
from upriver.curvature.base import Damping
from upriver.errors import ConfigError, InputError, MismatchError, UpriverError
from upriver.evaluate.pbrf import ProximalBregman
from upriver.evaluate.verify import agreement
from upriver.show.report import write_report

STEPS = 300


def traced(name, out, factors, **given):
    c = case(name)
    options = {"layers": c.spec, "rank": "full", "top": 4, "batch_tokens": 30, "dtype": "float64", "damping": "1x"}
    return up.trace(c.model, c.data, c.queries, factors, out, **(options | given))


def verified(name, scores, factors=None, **given):
    c = case(name)
    options = {"steps": STEPS, "top": 3, **given}
    told = up.verify(scores, c.model, c.data, c.queries, factors, **options)
    return told, pd.read_parquet(scores.path / "verify.parquet")


def expected(frame, exact_NQ, n_train):
    ids = list(dict.fromkeys(frame["query"]))
    at = [ids.index(name) for name in frame["query"]]
    return exact_NQ[frame["sequence"], at] / n_train


@pytest.mark.parametrize("name", ["llama", "classifier", "regressor"])
def test_what_is_realised_is_the_exact_influence(name, fitted, tmp_path):
    """By the dense solution with the damping of the trace; EK-FAC's own scores are far from it."""
    scores = traced(name, tmp_path / "scores", fitted(name))
    told, frame = verified(name, scores, fitted(name))
    lambdas = fitted(name).curvature().lambdas(Damping.parse("1x"))
    exact = expected(frame, dense_scores(name, matrix(name), lambdas), told["n_train"])
    assert np.abs(frame["realised_nats"] - exact).max() < 0.01 * np.abs(exact).max()
    assert np.abs(frame["predicted_nats"] - exact).max() > 0.02 * np.abs(exact).max()
    assert frame["residual"].max() < 1e-4
    assert set(frame["length"]) == {1.0}, "the sample is the whole corpus"


@pytest.mark.parametrize(("kind", "damping"), [("exact", "0.5x"), ("cg", "0.05")])
def test_an_exact_trace_is_calibrated(kind, damping, tmp_path):
    scores = traced("classifier", tmp_path / "scores", None, curvature=kind, damping=damping)
    told, _ = verified("classifier", scores, random=20)
    for part in (told["shown"], told["random"]):
        assert part["pearson"] == pytest.approx(1, abs=1e-4)
        assert part["slope"] == pytest.approx(1, abs=1e-2)
        assert part["scale"] == pytest.approx(1, abs=1e-2)


def test_it_is_what_the_proximal_optimum_with_one_more_passage_does_to_the_answer(fitted, tmp_path):
    """The other way round: that optimum is found for the passage, and the answer is measured there."""
    name, damping = "gpt2", 1.0
    c, scores = case(name), traced(name, tmp_path / "scores", fitted(name), damping=str(damping))
    told, frame = verified(name, scores, fitted(name), top=1, random=1)
    pbrf, ids = ProximalBregman(c.model, c.layers, c.data, damping), list(c.queries.ids)
    for row in frame[frame["query"] == ids[0]].to_dict("records"):
        response = pbrf.influence(c.data.batch(np.array([row["sequence"]])), c.queries)
        found = row["realised_nats"] * told["n_train"]
        assert found == pytest.approx(response.value_Q[0], rel=0.02, abs=1e-3)


def test_a_gradient_step_does_what_the_product_of_gradients_says(fitted, tmp_path):
    scores = traced("llama", tmp_path / "scores", fitted("llama"))
    told, frame = verified("llama", scores, fitted("llama"), how="finetune")
    g_NP, q_QP = flat("llama")
    products = expected(frame, -(g_NP @ q_QP.T).numpy(), told["n_train"])
    assert np.allclose(frame["predicted_nats"], products, rtol=1e-6, atol=1e-9)
    assert np.abs(frame["realised_nats"] - products).max() < 0.01 * np.abs(products).max()
    assert told["sample"]["sequences"] == 0


def test_what_is_shown_and_what_is_random(fitted, tmp_path):
    scores = traced("llama", tmp_path / "scores", fitted("llama"))
    told, frame = verified("llama", scores, fitted("llama"), top=2, random=3)
    top = pd.read_parquet(scores.path / "top.parquet")
    shown = frame[frame["shown"]].merge(top, on=["query", "side", "rank", "sequence"], validate="1:1")
    assert len(shown) == frame["shown"].sum() == (top["rank"] <= 2).sum()
    assert np.allclose(shown["predicted_nats"], shown["score_nats"], rtol=1e-5)
    random = frame[~frame["shown"]]
    assert random.groupby("query")["sequence"].apply(list).map(tuple).nunique() == 1
    assert not set(random["sequence"]) & set(frame.loc[frame["shown"], "sequence"])
    assert told["random"]["pairs"] == len(random) == 3 * len(case("llama").queries)


def test_on_a_part_of_the_corpus_other_sequences_set_the_length(fitted, tmp_path):
    scores = traced("classifier", tmp_path / "scores", fitted("classifier"))
    told, frame = verified("classifier", scores, fitted("classifier"), tokens=8)
    assert told["sample"] == told["length_from"] == {"sequences": 8, "tokens": 8}
    by_query = frame.groupby("query")["length"].first()
    assert by_query.nunique() == len(by_query)
    assert ((by_query > 0.05) & (by_query != 1)).all()


def test_agreement_by_its_definitions():
    p, r = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.5, 1.0])
    found = agreement(p, r)
    assert found["pearson"] == pytest.approx(np.corrcoef(p, r)[0, 1])
    assert found["slope"] == pytest.approx(np.polyfit(p, r, 1)[0])
    assert found["scale"] == pytest.approx(7.5 / 21)
    assert found["size"] == pytest.approx(np.sqrt(3.5 / 3))
    assert agreement(p[:1], r[:1])["pearson"] is None
    assert agreement(p[:0], r[:0]) == {"pairs": 0, "pearson": None, "slope": None, "scale": None, "size": None}


# ---- files


class Died(BaseException):
    """What a kill looks like from inside: nothing catches it."""


def test_a_run_that_was_killed_goes_on(fitted, tmp_path):
    c, advanced = case("classifier"), []
    asked = up.Measurements(up.Examples({name: x[:9] for name, x in c.data.inputs.items()}))

    @contextmanager
    def dying(name, total):
        def advance(done):
            advanced.append(done)
            if len(advanced) == 2:
                raise Died

        yield advance

    def run(out):
        options = {"layers": "*", "rank": "full", "top": 4, "dtype": "float64"}
        return up.trace(c.model, c.data, asked, fitted("classifier"), out, **options)

    given = (c.model, c.data, asked, fitted("classifier"))
    whole, scores = run(tmp_path / "whole"), run(tmp_path / "scores")
    up.verify(whole, *given)
    with pytest.raises(Died):
        up.verify(scores, *given, progress=dying)
    assert not (scores.path / "verify.json").exists()
    up.verify(scores, *given, progress=dying)
    assert advanced == [4, 4, 4, 1], "the first four questions were kept"
    pd.testing.assert_frame_equal(*(pd.read_parquet(x.path / "verify.parquet") for x in (whole, scores)))
    assert not (scores.path / "verify").exists()
    up.verify(scores, *given, progress=dying)
    assert len(advanced) == 4, "what is finished is used as it is"


def test_another_model_corpus_or_factors_are_refused(fitted, tmp_path):
    c, scores = case("llama"), traced("llama", tmp_path / "scores", fitted("llama"))
    wrong = {
        "model": case("neox").model,
        "corpus": c.data.permuted(np.arange(len(c.data))[::-1]),
        "factors": fitted("neox"),
    }
    for what, other in wrong.items():
        right = {"model": c.model, "corpus": c.data, "queries": c.queries, "factors": fitted("llama")}
        with pytest.raises(MismatchError, match=f"traced with another {what}: got"):
            up.verify(scores, **(right | {what: other}))
    with pytest.raises(InputError, match="model"):
        up.verify(scores)
    assert not (scores.path / "verify.json").exists()


def test_a_trace_without_curvature_takes_a_gradient_step_only(tmp_path):
    scores = traced("llama", tmp_path / "scores", None, curvature="identity", damping="0.1x")
    with pytest.raises(ConfigError, match="finetune"):
        verified("llama", scores)
    told, _ = verified("llama", scores, how="finetune")
    assert told["shown"]["scale"] == pytest.approx(1, abs=1e-3)


def test_nothing_of_anybody_else_is_replaced(fitted, tmp_path):
    scores = traced("llama", tmp_path / "scores", fitted("llama"))
    table = scores.path / "verify.parquet"
    table.write_text("mine")
    with pytest.raises(MismatchError, match="no verification wrote it"):
        verified("llama", scores, fitted("llama"), overwrite=True)
    assert table.read_text() == "mine"
    table.unlink()
    (scores.path / "verify.json").write_text('{"mine": 1}')
    for overwrite in (False, True):
        with pytest.raises(UpriverError):
            verified("llama", scores, fitted("llama"), overwrite=overwrite)
    assert (scores.path / "verify.json").read_text() == '{"mine": 1}'
    (scores.path / "verify.json").unlink()
    verified("llama", scores, fitted("llama"))
    with pytest.raises(MismatchError, match=r"options\.top: got 2 now, 3 then"):
        verified("llama", scores, fitted("llama"), top=2)
    told, _ = verified("llama", scores, fitted("llama"), top=2, overwrite=True)
    assert told["key"]["options"]["top"] == 2
    again = traced("llama", tmp_path / "scores", fitted("llama"), damping="0.1x", overwrite=True)
    assert not (again.path / "verify.json").exists(), "another trace takes its verification with it"


def test_a_damaged_table_is_refused_by_the_report(fitted, tmp_path):
    scores = traced("llama", tmp_path / "scores", fitted("llama"))
    verified("llama", scores, fitted("llama"))
    table = scores.path / "verify.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"verify\.parquet"):
        write_report(scores.path)


# ---- the command


def test_the_command_reads_again_what_the_trace_was_made_from(tmp_path, capsys, monkeypatch):
    tiny, scores = cli_cases.build_fitted(tmp_path), tmp_path / "scores"
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))

    def call(*args):
        return cli_cases.upriver(capsys, monkeypatch, *args)

    assert call(*cli_cases.trace(tiny, scores)).status == 0
    ran = call("verify", scores, "--top", 1, "--tokens", 200, "--steps", 3)
    assert ran.status == 0, ran.err
    assert ran.last_line == f"next: upriver report {scores} --open"
    told = json.loads((scores / "verify.json").read_text())
    assert "all questions shown" in ran.out
    assert all(x["id"] in ran.out for x in told["queries"])
    moved = tiny.model.rename(tmp_path / "moved")
    cli_cases.assert_one_error(
        call("verify", scores, "--top", 2, "--overwrite"), 2, "the model of the trace cannot be read", "--model"
    )
    assert call("verify", scores, "--top", 2, "--overwrite", "--model", moved, "--steps", 1).status == 0
    other = cli_cases.save_model(tmp_path / "other", cli_cases.tiny_llama(hidden_size=16))
    ran = call("verify", scores, "--top", 1, "--overwrite", "--model", other)
    cli_cases.assert_one_error(ran, 2, "was traced with another model: got")


# ---- the page


def test_the_page_shows_it(fitted, tmp_path):
    scores = traced("llama", tmp_path / "scores", fitted("llama"))
    before = payload(write_report(scores.path).read_text())
    assert before["verified"] is None
    assert {p["realised_nats"] for q in before["queries"] for p in q["passages"]} == {None}
    told, frame = verified("llama", scores, fitted("llama"), top=2)
    page = payload(write_report(scores.path).read_text())
    assert page["verified"]["shown"]["pearson"] == pytest.approx(told["shown"]["pearson"], rel=1e-6)
    known = {(r["query"], r["sequence"]): r["realised_nats"] for r in frame[frame["shown"]].to_dict("records")}
    for query in page["queries"]:
        assert len(query["verified"]["pairs"]) == (frame["query"] == query["id"]).sum()
        found = {(query["id"], p["sequence"]): p["realised_nats"] for p in query["passages"]}
        measured = {at: nats for at, nats in found.items() if nats is not None}
        assert measured == pytest.approx({at: known[at] for at in found if at in known}, rel=1e-6)
    facts = {f["label"]: f["value"] for g in page["trust"] if g["title"] == "Verified" for f in g["facts"]}
    assert page["verified"]["residual"] == pytest.approx(max(x["residual"] for x in told["queries"]), rel=1e-6)
    assert facts["Predicted against realised"] == f"{told['shown']['pearson']:.3f}"
