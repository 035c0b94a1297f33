"""The best passages in the terminal, with colour and without."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from report_fixture import seal, solved, write_scores
from upriver.errors import InputError
from upriver.show.terminal import terminal_summary


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scores(tmp_path_factory.mktemp("terminal") / "scores", queries=3, per_side=6, documents=20)


def printed(scores: Path, best: int = 3, width: int = 200, **console: object) -> str:
    sink = io.StringIO()
    terminal_summary(scores, Console(file=sink, width=width, **console), best=best)  # type: ignore[arg-type]
    return sink.getvalue()


def test_plain_output_names_each_query_its_passages_and_their_documents(scores: Path) -> None:
    text = printed(scores)
    assert "\x1b" not in text
    top = pd.read_parquet(scores / "top.parquet")
    assert len(re.findall(r"^  \d+\. [+-]", text, re.M)) == 3 * 3
    for query in ("blessing", "middle-east", "strong-weak"):
        best = top[(top["query"] == query) & (top["side"] == "positive") & (top["rank"] == 1)].iloc[0]
        assert f"1. {best['score_nats']:+.3g} nats" in text
        assert best["document"] in text
    assert "log-probability" in text
    assert "rather than 'weak and divided.'" in text
    assert "Positive means" in text


def test_held_out_energy_is_a_line_of_its_question(scores: Path, tmp_path: Path) -> None:
    assert "held-out" not in printed(scores)
    text = printed(solved(write_scores(tmp_path / "scores", queries=2, per_side=2, documents=4)))
    assert "held-out energy 341 (gradient 11.5), best scale 0.30" in text.splitlines()
    assert "held-out energy 18.4 (gradient 8.50), best scale 0.013" in text.splitlines()


def test_text_wraps_even_where_the_console_does_not(scores: Path) -> None:
    lines = printed(scores, width=60, soft_wrap=True).splitlines()
    assert max(map(len, lines)) <= 60


def test_colour_tints_tokens_where_the_terminal_has_it(scores: Path) -> None:
    assert re.search(r"\x1b\[[\d;]*48;2;\d+;\d+;\d+m", printed(scores, force_terminal=True, color_system="truecolor"))
    assert "48;" not in printed(scores, force_terminal=True, color_system=None)
    assert "48;" not in printed(scores)


def test_control_characters_of_a_corpus_do_not_reach_the_terminal(scores: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores"
    path.mkdir()
    for file in scores.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    top = pd.read_parquet(path / "top.parquet")
    top["document"] = "\x1b[2Jname\u202e"
    top["tokens"] = [["\x1b]0;title\x07", *list(tokens)[1:]] for tokens in top["tokens"]]
    top.to_parquet(path / "top.parquet")
    seal(path)
    text = printed(path)
    assert not set(text) & {"\x1b", "\x07", "\u202e"}


def test_markup_in_text_is_text(scores: Path, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores", queries=1, per_side=2, documents=5)
    top = pd.read_parquet(path / "top.parquet")
    top["document"] = "[bold red]loud[/bold red]"
    top.to_parquet(path / "top.parquet")
    seal(path)
    assert "[bold red]loud[/bold red]" in printed(path)


def test_a_folder_that_is_not_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder of results"):
        printed(tmp_path)
