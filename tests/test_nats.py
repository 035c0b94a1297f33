"""What a nat is: of one copy among the sequences that the factors were fitted for, in the length that held-out text measures."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

import upriver as up
from cases import case
from report_fixture import payload
from upriver.errors import ConfigError
from upriver.influence.results import calibration


def shard(c, rows):
    return type(c.data)([c.data.tokens[r] for r in rows], [c.data.loss[r] for r in rows])


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    c = case("llama")
    return up.fit(
        c.model, c.data, tmp_path_factory.mktemp("nats") / "factors", layers=c.spec, dtype="float64", max_tokens=40
    )


def traced(data, out, factors=None, **given):
    c = case("llama")
    options = {"layers": c.spec, "rank": "full", "top": 20, "dtype": "float64", "damping": "1x", "held_out": 0}
    return up.trace(c.model, data, c.queries, factors, out, **(options | given))


def nats(scores, column="score_nats") -> Any:
    return pd.read_parquet(scores.path / "top.parquet").set_index(["query", "sequence"])[column]


def test_a_shard_has_the_nats_of_the_whole(factors, tmp_path):
    c = case("llama")
    said = []
    whole = traced(c.data, tmp_path / "whole", factors)
    part = traced(shard(c, range(6)), tmp_path / "part", factors, say=said.append)
    assert whole.manifest["n_train"] == part.manifest["n_train"] == len(c.data) == 14
    assert part.manifest["n_train_from"] == "factors"
    assert part.manifest["scored_sequences"] == 6
    found = nats(part)
    np.testing.assert_allclose(found, nats(whole)[found.index], rtol=1e-5)
    assert any("fitted on another corpus; nats are those of a copy among its 14 sequences" in line for line in said)


def test_who_knows_better_says_so(factors, tmp_path):
    c = case("llama")
    found = traced(c.data, tmp_path / "given", factors, n_train=1000)
    assert (found.manifest["n_train"], found.manifest["n_train_from"]) == (1000, "given")
    top = pd.read_parquet(found.path / "top.parquet")
    np.testing.assert_allclose(top["score_nats"], top["score"] / 1000, rtol=1e-6)
    own = traced(c.data, tmp_path / "own", None, curvature="exact")
    assert (own.manifest["n_train"], own.manifest["n_train_from"]) == (14, "corpus")
    with pytest.raises(ConfigError, match="in no unit: got --n-train 5"):
        traced(c.data, tmp_path / "plain", None, curvature="identity", damping="0.1x", n_train=5)


def test_nats_have_the_length_that_held_out_sequences_measure(factors, tmp_path):
    c = case("llama")
    scores = traced(c.data, tmp_path / "scores", factors, held_out=30)
    scale = {x["id"]: x["solution"]["best_scale"] for x in json.loads((scores.path / "queries.json").read_text())}
    assert all(abs(x - 1) > 1e-3 for x in scale.values())
    plain, found = nats(scores), nats(scores, "calibrated_nats")
    np.testing.assert_allclose(found, plain * plain.index.get_level_values(0).map(scale), rtol=1e-5)
    page = payload(scores.report().read_text())
    for query in page["queries"]:
        assert query["calibration"] == pytest.approx(scale[query["id"]], rel=1e-6)
        shown = {p["sequence"]: p["calibrated_nats"] for p in query["passages"]}
        assert shown == pytest.approx(found[query["id"]].to_dict(), rel=1e-5)
    assert "to calibrate it, times" in page["unit"]
    told = up.verify(scores, c.model, c.data, c.queries, factors, steps=50, top=2, random=2)
    frame: Any = pd.read_parquet(scores.path / "verify.parquet")
    np.testing.assert_allclose(frame["calibrated_nats"], frame["predicted_nats"] * frame["query"].map(scale), rtol=1e-6)
    one = told["queries"][0]
    own = frame[(frame["query"] == one["id"]) & frame["shown"]]
    p, r = own["calibrated_nats"], own["realised_nats"]
    assert one["shown"]["scale"] == pytest.approx((p @ r) / (p @ p), rel=1e-9)
    assert told["uncalibrated"]["shown"]["scale"] != pytest.approx(told["shown"]["scale"], rel=1e-3)


def test_without_held_out_sequences_nothing_is_calibrated(factors, tmp_path):
    scores = traced(case("llama").data, tmp_path / "scores", factors)
    assert nats(scores, "calibrated_nats").isna().all()
    page = payload(scores.report().read_text())
    assert "not calibrated" in page["unit"]
    assert calibration({"best_scale": -0.2}) is None  # it would turn the ranking round
