"""The benchmark of a GPU in its reduced form on the CPU: what it writes, that equality can fail, and what an error costs."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from upriver.influence.queries import Measurements

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[str, dict]:
    """The table and the numbers of all parts."""
    out = tmp_path_factory.mktemp("gpu")
    gpu.main(["--out", str(out), "--small", "--device", "cpu"])
    return (out / "gpu.md").read_text(), json.loads((out / "gpu.json").read_text())


def rows_of(told: dict, part: str) -> list[dict]:
    return [row for row in told["rows"] if row["part"] == part]


def test_every_part_has_its_rows_with_the_goals_beside_them(written):
    table, told = written
    assert list(dict.fromkeys(row["part"] for row in told["rows"])) == list(gpu.PARTS)
    assert [row for row in told["rows"] if "failed" in row["found"] and row["part"] != "peers"] == []
    assert told["device"].startswith("CPU (")
    assert table.startswith(told["device"])
    lines = table.splitlines()[2:]
    assert lines[0] == "| part | what | found | goal | met |"
    assert len(lines) == 2 + len(told["rows"])
    for line, row in zip(lines[2:], told["rows"], strict=True):
        assert line.startswith(f"| {row['part']} | {row['what']} | {row['found']} | {row['goal']} |")
    goals = {"at least 0.9 of a step's", "at most 3.2 steps", "at most 80 GB", "at most 1e-04", "at least 0.999"}
    assert goals <= {row["goal"] for row in told["rows"]}


def test_speeds_and_peaks_are_numbers_held_against_their_goals(written):
    _, told = written
    speeds = {row["what"]: row for row in rows_of(told, "speed") if row["value"] is not None}
    passes = [
        "plain step",
        "covariance",
        "correction",
        "scan, 2 questions",
        "scan, 6 questions",
        "rescore, 4 questions",
    ]
    assert list(speeds) == [f"tiny {x}" for x in [*passes, "fit, both passes"]]
    both = sum(1 / speeds[f"tiny {x}"]["value"] for x in ("covariance", "correction"))
    assert speeds["tiny fit, both passes"]["value"] == pytest.approx(both)
    scan = speeds["tiny scan, 2 questions"]
    assert scan["met"] == (scan["value"] >= gpu.SCAN)
    peaks = {row["what"].removeprefix("tiny "): row for row in rows_of(told, "memory")}
    assert {"covariance", "eigendecomposition", "correction", "queries", "scan", "rescore"} <= set(peaks)
    assert all(row["value"] > 0 and row["met"] == (row["value"] <= 1) for row in peaks.values())
    assert 0 < rows_of(told, "large")[-1]["value"] < gpu.ROOM


def test_peers_that_are_not_there_are_said_to_be(written):
    _, told = written
    missing = [row["what"] for row in rows_of(told, "peers") if row["found"] == "not installed"]
    assert missing == [side for side in gpu.SIDES if not find_spec(side)]


def test_scores_are_equal_in_other_batches_and_not_where_a_weight_is_off_by_a_thousandth(written, tmp_path):
    """Of two sums in another order some digits differ, so that equality is no matter of course."""
    exact, rounded = rows_of(written[1], "equal")
    assert 0 < exact["value"] <= gpu.SAME
    assert gpu.ALIKE <= rounded["value"] < 1
    assert exact["met"]
    assert rounded["met"]
    s, bench = gpu.SMALL, gpu.Bench(gpu.SMALL, CPU, tmp_path)
    corpus, asked = bench.draw("tiny", 64 * s.length, s.length), Measurements(bench.draw("tiny", 64, 32, 16, seed=2))
    model = gpu.build("tiny", CPU, torch.float32, s.length)
    true_NQ = gpu.scores_of(model, corpus, asked, tmp_path / "true", "float32", s.batch)
    model.module.model.layers[0].mlp.up_proj.weight.data *= 1.001
    found_NQ = gpu.scores_of(model, corpus, asked, tmp_path / "off", "float32", s.batch)
    assert gpu.apart(true_NQ, true_NQ) == 0
    assert gpu.apart(found_NQ, true_NQ) > gpu.SAME
    assert gpu.alike(-true_NQ, true_NQ) == pytest.approx(-1)


def test_a_part_that_fails_leaves_the_rows_before_it_and_the_other_parts():
    rows = gpu.run(["speed", "large"], gpu.SMALL._replace(speed=("none",)), CPU)
    speeds, larges = ([row for row in rows if row.part == part] for part in ("speed", "large"))
    assert [row.what for row in speeds] == ["bfloat16 peak", ""]
    assert speeds[-1].found == "failed: KeyError: 'none'"
    assert larges[-1].met


def test_no_part_begins_after_the_time_that_there_is():
    rows = gpu.run(["equal", "large"], gpu.SMALL, CPU, minutes=-1)
    assert [(row.part, row.found) for row in rows] == [(x, "left out: -1 minutes are over") for x in ("equal", "large")]


def test_a_part_that_there_is_not_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--parts", "equal,sped"])
    assert "no such part: got sped; some of equal, speed, memory, peers, large" in capsys.readouterr().err
