"""The study of adapters in its reduced form: tuned and preferred, by the command line, in this process."""

from pathlib import Path

import numpy as np
import pytest

from cli_cases import upriver

ROOT = Path(__file__).parent.parent
STUDY, DEMO = ROOT / "studies" / "adapter" / "study.py", ROOT / "src" / "upriver" / "demo" / "speech-model"


def test_no_statement_is_worded_as_the_question_and_four_teach_each_fact(study):
    world = study.World.of(study.FULL.people)
    assert len(world.statements) == 200
    assert world.taught_NQ.sum(0).tolist() == [4] * 50
    assert not {x.prompt for x in world.statements} & {q.prompt for q in world.asked}
    assert all(x.right != x.wrong for x in world.asked)
    assert len({q.prompt for q in world.asked}) == 50


def test_places_count_ties_half(study):
    scores_NQ = np.array([[3.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    taught_NQ = np.array([[False, True], [True, False], [True, False]])
    assert study.mean_reciprocal(scores_NQ, taught_NQ) == {"mrr": 0.5, "first": 0.0}


@pytest.mark.slow
def test_statements_behind_a_preferred_answer_come_before_others(study, tmp_path, capsys, monkeypatch):
    def command(*args: str) -> None:
        ran = upriver(capsys, monkeypatch, *args)
        assert ran.status == 0, ran.err

    found = study.study(study.REDUCED, tmp_path, command, ("preferred",))["preferred"]
    assert set(found["table"]) == {*study.SCORES, *study.BASELINES}
    assert found["tracked"] == found["trained"] > 0
    assert found["table"]["EK-FAC"]["mrr"] > 0.6
    assert study.printed({"preferred": found}).count("\n| ") == len(found["table"]) + 1


@pytest.mark.slow
def test_tuning_on_the_text_teaches_the_answers(study, tmp_path):
    world = study.World.of(2)
    study.tuned(DEMO, world, study.REDUCED, False, tmp_path / "adapter")
    assert study.known(DEMO, tmp_path / "adapter", world, False).mean() >= 0.75
