"""The study of accuracy in its reduced form: both ways to the truth agree, and solvers stand where they must."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STUDY = Path(__file__).parent.parent / "studies" / "accuracy" / "study.py"


@pytest.mark.slow
def test_the_reduced_study_scores_every_solver_against_the_truth(study, tmp_path):
    args = argparse.Namespace(reduced=True, fashion=None, out=tmp_path / "out", work=tmp_path / "work")
    told = study.study("concrete", args)
    assert json.loads((tmp_path / "out" / "concrete.json").read_text()) == told
    found = {solver: row["pearson"] for solver, row in told["rows"].items()}
    assert found["conjugate gradients"] > 0.995
    assert found["exact Gauss-Newton"] > 0.995
    assert found["conjugate gradients"] > found["EK-FAC"] > found["gradient dot product (identity)"]
    assert found["EK-FAC, refine 10"] > found["EK-FAC"]
    assert abs(found["baseline: random"]) < 0.5
    assert told["truth_gradient"] <= study.RESIDUAL
    assert told["direct"]["largest_difference"] < 0.01, "the truth by its definition, from nothing"
    rows = told["rows"]
    assert rows["LiSSA, 20 steps"]["operations"] > rows["LiSSA, 5 steps"]["operations"] > 0
    assert rows["EK-FAC"]["operations"] == 2 * told["train"], "a pass for covariances and one for eigenvalues"
    printed = study.table(told).splitlines()
    assert len(printed) == len(rows) + 4
    assert all(line.count("|") == 5 for line in printed[:-2])
    again = study.study("concrete", args)
    assert again == told, "what is finished is kept"


def test_correlations_are_those_of_every_question(study):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30, 3))
    y[:, 2] = -2 * x[:, 2] + 1
    found = study.pearson(x, y)
    np.testing.assert_allclose(found[:2], [np.corrcoef(x[:, q], y[:, q])[0, 1] for q in range(2)])
    assert found[2] == pytest.approx(-1)
    assert study.pearson(np.ones((4, 1)), rng.standard_normal((4, 1)))[0] == 0


def test_the_price_of_an_accuracy_lies_between_two_rows(study):
    def row(pearson: float, cost: float) -> dict:
        return {"pearson": pearson, "seconds": cost, "operations": 10 * cost}

    rows = {"EK-FAC": row(0.5, 2), "LiSSA, 1 steps": row(0.4, 2), "LiSSA, 9 steps": row(0.6, 18)}
    assert "takes 3.0 times its seconds, 3.0 times its sequences" in study.price(rows)
    assert "more than 9.0" in study.price(rows | {"EK-FAC": row(0.7, 2)})
    assert "at most 1.0" in study.price(rows | {"EK-FAC": row(0.3, 2)})


def test_the_study_asks_for_the_data_that_it_does_not_ship():
    told = subprocess.run([sys.executable, str(STUDY), "fashion"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "fashion needs --fashion FILE.npz" in told.stderr
