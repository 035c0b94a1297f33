"""Sums over groups of documents: what they add up to, how wide their intervals are, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import upriver as up
from cli_cases import assert_one_error, build, fit, trace, upriver
from report_fixture import payload
from text_cases import write_jsonl
from upriver.errors import ConfigError, InputError, MismatchError, QueryError
from upriver.show.groups import bootstrap, grouped, read_groups

TOPICS = ["war", "peace", None, "</script><b>"]
RECORDS: list[dict[str, Any]] = [
    {"id": f"d{i}", "text": f"the people of state {i} " + "and the union " * (1 + i % 5), "year": 1901 + 7 * i}
    | {"at": {"place": i % 2}}
    | ({"topic": TOPICS[i % 4]} if i % 4 != 2 else {})
    for i in range(16)
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("groups")
    return build(root)._replace(corpus=write_jsonl(root / "corpus.jsonl", RECORDS))


@pytest.fixture
def call(capsys, monkeypatch, tiny):
    monkeypatch.setenv("UPRIVER_CACHE", str(tiny.root / "cache"))
    return lambda *args: upriver(capsys, monkeypatch, *args)


@pytest.fixture
def scores(tiny, call) -> Path:
    out = tiny.root / "scores"
    if not (out / "manifest.json").exists():
        assert call(*fit(tiny, tiny.root / "factors")).status == 0
        assert call(*trace(tiny, out, factors=tiny.root / "factors")).status == 0
    return out


def nats(scores: Path) -> pd.DataFrame:
    """The sums of documents in the unit that is shown, by a loop over the questions."""
    found = up.Scores(scores)
    table = found.documents().set_index("document")
    for query in found.queries:
        scale = (query["solution"] or {}).get("best_scale") or 1.0
        table[query["id"]] = (
            table[query["id"]].astype(float) / found.manifest["n_train"] * (scale if scale > 0 else 1.0)
        )
    return table


def test_sums_by_a_field_are_those_of_its_documents(scores, call):
    ran = call("report", scores, "--by", "topic", "--by", "at.place", "--contrast", "people", "peace")
    assert ran.status == 0, ran.err
    table, documents = pq.read_table(scores / "groups-topic.parquet").to_pandas().replace({np.nan: None}), nats(scores)
    assert table["group"].tolist()[:4] == ["</script><b>", "peace", "war", None]
    for row in table.to_dict("records"):
        own = [r["id"] for r in RECORDS if r.get("topic") == row["group"] and r["id"] in documents.index]
        values = documents.loc[own, row["query"]]
        if row["minus"]:
            values = values - documents.loc[own, row["minus"]]
        assert row["sum"] == pytest.approx(values.sum(), rel=1e-5)
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert (row["documents"], row["sequences"]) == (len(own), documents.loc[own, "sequences"].sum())
        assert row["low"] <= row["sum"] <= row["high"]
    assert set(zip(table["query"], table["minus"], strict=True)) == {
        ("people", None),
        ("peace", None),
        ("people", "peace"),
    }
    place = pq.read_table(scores / "groups-at.place.parquet").to_pandas()
    assert place["group"].tolist() == ["0", "1"] * 3
    whole = documents["people"].sum()
    assert place.loc[(place["query"] == "people") & place["minus"].isna(), "sum"].sum() == pytest.approx(
        whole, rel=1e-5
    )
    page = (scores / "report.html").read_text()
    shown = payload(page)["queries"][0]["groups"]
    assert [[part["minus"] for part in field] for field in shown] == [[None, "peace"]] * 2
    assert [r["group"] for r in shown[1][0]["rows"]] == ["</script><b>", "peace", "war", None]
    assert "<b>" not in page.split("<noscript>")[1].split("</noscript>")[1]


def test_the_interval_is_that_of_a_bootstrap_over_documents():
    """Its ends are two standard errors away, of sums in which the size of a group varies, and of means in which it does not."""
    rng = np.random.default_rng(1)
    values_DC, code_D = rng.normal(1.0, 2.0, (900, 2)), rng.integers(0, 3, 900)
    found = bootstrap(values_DC, code_D, 3, 2000, 0)
    for g in range(3):
        own = values_DC[code_D == g]
        error_C = np.sqrt((own**2).sum(0) - own.sum(0) ** 2 / 900)
        np.testing.assert_allclose(found["high"][g] - found["low"][g], 2 * 1.96 * error_C, rtol=0.08)
        width_C = found["mean_high"][g] - found["mean_low"][g]
        np.testing.assert_allclose(width_C, 2 * 1.96 * own.std(0) / math.sqrt(len(own)), rtol=0.08)


def test_it_depends_on_the_seed_alone_and_a_difference_is_paired(monkeypatch):
    rng = np.random.default_rng(2)
    shared_D = rng.normal(0, 10, 200)
    values_DC = np.stack([shared_D + rng.normal(0, 0.1, 200), shared_D], 1)
    values_DC, code_D = np.concatenate([values_DC, values_DC[:, :1] - values_DC[:, 1:]], 1), np.arange(200) % 2
    first = bootstrap(values_DC, code_D, 2, 300, 5)
    width = first["high"] - first["low"]
    assert (width[:, 2] < width[:, 0] / 20).all()
    monkeypatch.setattr("upriver.show.groups.HELD", 1 << 13)  # one draw, and one column, at a time
    again = bootstrap(values_DC, code_D, 2, 300, 5)
    for name, x in first.items():
        np.testing.assert_allclose(x, again[name], rtol=1e-10)
    assert not np.allclose(first["low"], bootstrap(values_DC, code_D, 2, 300, 6)["low"])


@pytest.mark.parametrize(
    ("values", "names", "width"),
    [
        (
            [1787, 1999, None, 2026, *range(1800, 1900, 3)],
            ["1780 to 1799", *(f"{a} to {a + 19}" for a in (1800, 1820, 1840, 1860, 1880, 1980)), "2020 to 2039", None],
            20,
        ),
        (["10", "9", "9", ""], ["9", "10", None], None),
        (["007", "12", "12"], ["007", "12"], None),
        ([True, False, True], ["false", "true"], None),
        ([0.25, 0.5, float("nan")], ["0.25", "0.5", None], None),
        ([x / 100 for x in range(20)], [f"{x / 50:.2g} to {x / 50 + 0.02:.2g}" for x in range(10)], 0.02),
        (["b", 5, "b"], ["5", "b"], None),
    ],
)  # fmt: skip
def test_values_become_groups(values, names, width):
    code_D, groups, found = grouped(values, "x")
    assert [group.name for group in groups] == names
    assert found == width
    assert len(np.unique(code_D)) == len(groups), "no group is empty"
    for value, code in zip(values, code_D, strict=True):
        group = groups[code]
        if group.low is not None and width:
            assert group.low <= value < group.high + 1e-9
        assert (group.name is None) == (value in (None, "") or value != value)


def test_a_width_of_bins_can_be_given(scores):
    table = up.by_group(scores, "year", width=50)
    assert table["group"].tolist()[:2] == ["1900 to 1949", "1950 to 1999"]
    told = read_groups(scores, up.Scores(scores).manifest)
    assert [(x.told["field"], x.told["bin"]) for x in told if x.told["field"] == "year"] == [("year", 50)]
    assert up.Scores(scores).by("year")["group"].iloc[0] == "1900 to 1909"


def test_what_cannot_be_grouped_is_one_sentence(scores, call, tmp_path, tiny):
    for flags, parts in (
        (("--by", "nothing"), ("no record has the field 'nothing'", "year", "topic")),
        (("--by", "at"), ("name a field of it",)),
        (("--by", "year", "--contrast", "people", "nobody"), ("'nobody'",)),
        (("--contrast", "people", "peace"), ("--by",)),
        (("--by", "year", "--corpus", tiny.queries), ("not those that were scored",)),
    ):
        assert_one_error(call("report", scores, *flags), 2, *parts)
    with pytest.raises(ConfigError, match="too many groups: the field 'x' has 1,001 values"):
        grouped([f"url{i}" for i in range(1001)], "x")
    with pytest.raises(ConfigError, match="which holds texts"):
        grouped(["a"], "x", width=3)
    with pytest.raises(QueryError, match="nobody"):
        up.by_group(scores, "year", contrasts=[("people", "nobody")])
    with pytest.raises(MismatchError):
        up.by_group(scores, "year", corpus=tiny.queries)


def test_a_damaged_table_and_somebody_elses_file_are_told(scores):
    up.by_group(scores, "year")
    place = scores / "groups-year.parquet"
    content = place.read_bytes()
    try:
        place.write_bytes(content[:60] + b"\xff\x00\xff" + content[63:])
        with pytest.raises(InputError, match=r"groups-year\.parquet"):
            up.Scores(scores).report(scores.parent / "page")
        pd.DataFrame({"mine": [1]}).to_parquet(place)
        with pytest.raises(ConfigError, match="did not write"):
            up.by_group(scores, "year")
    finally:
        place.write_bytes(content)


def test_tables_go_with_the_trace_they_are_of(tiny, call, scores, tmp_path):
    """`--overwrite` replaces them with the results, as it does an earlier report."""
    out = tmp_path / "scores"
    assert call(*trace(tiny, out, factors=tiny.root / "factors")).status == 0
    assert call("report", out, "--by", "year").status == 0
    assert call(*trace(tiny, out, "--top", 1, "--overwrite", factors=tiny.root / "factors")).status == 0
    assert not list(out.glob("groups-*"))
    assert json.loads((scores / "queries.json").read_text())
