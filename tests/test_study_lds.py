"""The study of the linear datamodelling score in its reduced form: every row is there, and the ceiling is above the floor."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import upriver as up

STUDY = Path(__file__).parent.parent / "studies" / "lds" / "study.py"


@pytest.mark.slow
def test_the_reduced_study_scores_every_solver(study, tmp_path):
    bank, rows = study.study(study.REDUCED, tmp_path)
    assert {*study.SOLVERS, "metagradient, of one training", "random", "loss"} <= set(rows)
    score = {name: up.lds(bank, list(row.scores.values())[-1]).mean for name, row in rows.items()}
    assert score["metagradient, of one training"] > 0.5
    assert score["exact Gauss-Newton"] == pytest.approx(score["EK-FAC, `--refine 10`"], abs=0.2)
    assert abs(score["random"]) < 0.4
    printed = study.table(study.REDUCED, bank, rows).splitlines()
    assert len(printed) == len(rows) + 2
    assert all(line.count("|") == 7 for line in printed)
    assert sum(bool(re.search(r"\d \[-?\d\.\d+, -?\d\.\d+\]", line)) for line in printed) == len(rows)
    (own,) = (line for line in printed if line.startswith("| EK-FAC |"))
    assert "| +0.000 [+0.000, +0.000] |" in own


def test_the_study_tells_what_it_does():
    told = subprocess.run([sys.executable, str(STUDY), "--help"], capture_output=True, text=True, check=True)
    assert "--reduced" in told.stdout
