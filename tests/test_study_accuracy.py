"""The study of accuracy in its reduced form: both ways to the truth agree, and solvers stand where they must."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STUDY = Path(__file__).parent.parent / "studies" / "accuracy" / "study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_accuracy", STUDY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["concrete", "digits"])
def test_the_reduced_study_scores_every_solver_against_the_truth(study, name, tmp_path):
    args = argparse.Namespace(reduced=True, fashion=None, out=tmp_path / "out", work=tmp_path / "work")
    told = study.study(name, args)
    assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == told
    found = {solver: row["pearson"] for solver, row in told["rows"].items()}
    assert found["conjugate gradients"] > 0.995
    assert found["exact Gauss-Newton"] > 0.995
    assert found["conjugate gradients"] > found["EK-FAC"] > found["gradient dot product (identity)"]
    assert found["EK-FAC, refine 10"] > found["EK-FAC"]
    assert abs(found["baseline: random"]) < 0.5
    assert told["truth_gradient"] <= study.RESIDUAL
    if name == "concrete":
        assert told["direct"]["largest_difference"] < 0.01, "the truth by its definition, from nothing"
    rows = told["rows"]
    assert rows["LiSSA, 20 steps"]["operations"] > rows["LiSSA, 5 steps"]["operations"] > 0
    assert rows["EK-FAC"]["operations"] == 2 * told["train"] * (1 if name == "concrete" else 10)
    printed = study.table(told).splitlines()
    assert len(printed) == len(rows) + 2
    assert all(line.count("|") == 5 for line in printed)
    again = study.study(name, args)
    assert again == told, "what is finished is kept"


def test_correlations_are_those_of_every_question(study):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30, 3))
    y[:, 2] = -2 * x[:, 2] + 1
    found = study.pearson(x, y)
    np.testing.assert_allclose(found[:2], [np.corrcoef(x[:, q], y[:, q])[0, 1] for q in range(2)])
    assert found[2] == pytest.approx(-1)
    assert study.pearson(np.ones((4, 1)), rng.standard_normal((4, 1)))[0] == 0


def test_the_study_asks_for_the_data_that_it_does_not_ship():
    told = subprocess.run([sys.executable, str(STUDY), "fashion"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "fashion needs --fashion FILE.npz" in told.stderr
