"""The best passages of each query, printed: scores, documents, and an excerpt tinted by the influence of its tokens."""

import math
import re
from pathlib import Path

from rich.console import Console, Group
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from upriver.show.data import answer, sign, unit
from upriver.show.folder import Json, read_folder

EXCERPT = 280  # characters
RAISES, LOWERS = (67, 147, 195), (214, 96, 77)  # the RdBu scale, as on the page
# Control characters and those that reorder text: corpus text must not steer the terminal.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def terminal_summary(scores: Path, console: Console, best: int = 3) -> None:
    """Print each query's answer and its ``best`` most positive passages.

    Raises:
        InputError: ``scores`` is not the folder of a finished trace.
    """
    folder = read_folder(Path(scores))
    for query in (answer(folder, query) for query in folder.queries):
        console.print(_headline(query), soft_wrap=False)
        passages = [p for p in query["passages"] if p["side"] == "positive" and p["duplicate_of"] is None][:best]
        if not passages:
            console.print(
                Padding(Text("no passage raises this answer", style="dim"), (0, 0, 1, 2), expand=False), soft_wrap=False
            )
        for passage in passages:
            copies = sum(p["duplicate_of"] == passage["rank"] and p["side"] == "positive" for p in query["passages"])
            console.print(
                Padding(Group(_line(passage, copies), _excerpt(passage)), (0, 0, 1, 2), expand=False), soft_wrap=False
            )
    console.print(Text(f"{sign(folder)} {unit(folder)}", style="dim"), soft_wrap=False)


def _headline(query: Json) -> Text:
    text = Text(_safe(query["prompt"] or ""), style="dim", end="\n")
    text.append(_safe(query["completion"] or ""), style="bold not dim")
    if query["contrast"]:
        text.append(f"  rather than {_safe(query['contrast']).strip()!r}")
    if query["log_prob"] is not None:
        measured = "difference of log-probabilities" if query["contrast"] else "log-probability"
        text.append(f"   {measured} {query['log_prob']:.3f} nats", style="not dim")
        if not query["contrast"]:
            text.append(f" (p = {math.exp(min(0.0, query['log_prob'])):.2g})")
    return text


def _line(passage: Json, copies: int) -> Text:
    nats, raw = passage["score_nats"], f"raw {_number(passage['score'])}"
    text = Text(f"{passage['rank']}. ", style="bold")
    text.append(f"{_number(nats)} nats" if nats is not None else raw, style="bold")
    facts = [raw] if nats is not None else []
    facts += [_safe(str(passage["document"]))]
    facts += [_safe(f"{value}") for value in list(passage["metadata"].values())[:2] if isinstance(value, (str, int))]
    facts += [f"×{copies + 1} near-duplicates"] if copies else []
    facts += ["spurious: few tokens hold it all"] if passage["spurious"] else []
    text.append("  " + " · ".join(fact[:60] for fact in facts), style="dim")
    return text


def _excerpt(passage: Json) -> Text:
    """About 280 characters from the start of the sentence with the largest sum."""
    tokens, scores = passage["tokens"], passage["token_scores"]
    if not tokens:
        return Text(_safe(passage["text"][:EXCERPT]))
    start = max(passage["sentences"], key=lambda sentence: sentence["carried"])["start"]
    largest = max((abs(score) for score in scores if score), default=0) or 1
    text, end = Text("… " if start else ""), start
    while end < len(tokens) and len(text) < EXCERPT:
        piece = _safe(tokens[end][:EXCERPT])
        text.append(piece.lstrip() if end == start else piece, style=_tint((scores[end] or 0) / largest))
        end += 1
    return text.append(" …") if end < len(tokens) else text


def _tint(share: float) -> Style | None:
    """A background from black towards blue (raises) or red (lowers); small shares stay plain."""
    if abs(share) < 0.08:
        return None
    red, green, blue = (round(channel * (0.25 + 0.75 * abs(share))) for channel in (RAISES if share > 0 else LOWERS))
    return Style(bgcolor=f"rgb({red},{green},{blue})", color="black" if abs(share) > 0.5 else "white")


def _number(value: float) -> str:
    return f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"


def _safe(text: str) -> str:
    return UNSAFE.sub(" ", text)
