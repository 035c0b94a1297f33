"""The study of a language model's LDS in its reduced form: every solver and baseline is there, and what was asked was learnt."""

from pathlib import Path

import numpy as np
import pytest

import upriver as up

STUDY = Path(__file__).parent.parent / "studies" / "lds" / "language.py"


@pytest.mark.slow
def test_the_reduced_study_scores_every_solver_and_baseline(study, tmp_path):
    few = {name: how for name, how in study.SOLVERS.items() if how["curvature"] in ("identity", "ekfac", "tracincp")}
    bank, rows = study.study(study.REDUCED, tmp_path, few)
    assert set(rows) == {"metagradient", *few, *study.BASELINES}
    assert up.lds(bank, rows["metagradient"].scores_NQ).mean > 0.7, "halves that were left out are told apart"
    printed = study.table(bank, rows).splitlines()
    assert len(printed) == len(rows) + 2
    (own,) = (line for line in printed if line.startswith("| EK-FAC |"))
    assert "| 1.00 |" in own
    again = study.study(study.REDUCED, tmp_path, few)[1]
    assert all(np.array_equal(rows[name].scores_NQ, again[name].scores_NQ) for name in rows), "what is finished is kept"


def test_half_of_the_sources_agree_on_what_is_asked(study):
    world = study.World.of(study.FULL)
    for query in world.asked:
        claims = [text for text in world.told if text.startswith(query["prompt"])]
        assert len(claims) == study.FULL.told
        assert sum(query["completion"].strip() in text.split() for text in claims) == study.FULL.told // 2
    assert len({tuple(text.split()[:-2]) for text in world.before}) >= study.FULL.people * study.FULL.values
