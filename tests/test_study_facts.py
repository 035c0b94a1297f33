"""The study of facts in its reduced form: every row is there, ranks are as defined, and hidden facts share no rare word."""

from pathlib import Path

import numpy as np
import pytest

STUDY = Path(__file__).parent.parent / "studies" / "facts" / "study.py"


def test_places_count_ties_half(study):
    scores_NQ = np.array([[3.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    taught_NQ = np.array([[False, True], [True, False], [True, False]])
    found = study.ranks(scores_NQ, taught_NQ)
    assert found["reciprocal"] == [0.5, 0.5]  # second of three; one of three equals
    assert found["recall_5"] == [1.0, 1.0]


def test_what_taught_a_fact_by_nickname_does_not_hold_the_name(study):
    world = study.World.of(study.FULL)
    for query, fact, direct in zip(world.asked, world.asked_facts, world.direct, strict=True):
        name = f"name{fact[0]}"
        assert name in query["prompt"].split()
        taught = [text.split() for text, of in zip(world.texts, world.facts, strict=True) if of == fact]
        assert len(taught) == 4
        assert all(query["completion"].strip() in words for words in taught)
        assert sum(name in words for words in taught) == (2 if direct else 0)


@pytest.mark.slow
def test_the_reduced_study_scores_every_curvature_and_baseline(study, tmp_path):
    found = study.study(study.REDUCED, tmp_path)
    assert {*study.SCORES, *study.BASELINES, "EK-FAC, unit-norm"} == set(found["table"]) - {
        f"{name}, unit-norm" for name in ("gradient dot product", "diagonal", "K-FAC")
    }
    mrr = {name: kinds["direct"]["reciprocal"] for name, kinds in found["table"].items()}
    assert mrr["EK-FAC"] > 2 * mrr["loss"]
    assert study.printed(found).count("\n| ") == len(found["table"]) + 1
