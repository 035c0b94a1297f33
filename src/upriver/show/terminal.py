"""A run prints lines and progress bars on standard error, and at its end the best passages of each query."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import progress as shown
from rich.console import Console, Group
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from upriver.show.audit import Audit
from upriver.show.data import answer, shown_nats, sign, unit
from upriver.show.folder import UNSAFE, Json, read_folder
from upriver.show.trust import figure, held_out

EXCERPT, MEMBERS = 280, 5  # characters; members of a set that are shown
QUESTIONS = 50  # that are printed
RAISES, LOWERS = (67, 147, 195), (214, 96, 77)  # the RdBu scale, as on the page
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line; what no terminal can show of the name of a file is written out."""
    stderr.print(line.encode("utf-8", "backslashreplace").decode(), markup=False)


@contextmanager
def bars(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error with rate and remaining time, and say one line at the end."""
    start = time.perf_counter()
    with _bar() as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
    seconds = time.perf_counter() - start
    say(f"{name}: {total:,} in {seconds:.1f} s ({total / max(seconds, 1e-9):,.0f}/s)")


@contextmanager
def running_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show the same for work that tells how far it is and how much there is."""
    with _bar() as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _bar() -> shown.Progress:
    columns = (
        shown.SpinnerColumn(), shown.TextColumn("{task.description}"), shown.BarColumn(), shown.MofNCompleteColumn(),
        Rate(), shown.TimeRemainingColumn(),
    )  # fmt: skip
    return shown.Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


class Rate(shown.ProgressColumn):
    """This column shows how much is done in a second."""

    def render(self, task: shown.Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


def terminal_summary(scores: Path, console: Console, best: int = 3) -> None:
    """Print each query's answer and its ``best`` most positive passages.

    Raises:
        InputError: ``scores`` is not the folder of a finished trace.
    """
    folder = read_folder(Path(scores))

    def show(*lines: Text) -> None:
        console.print(Padding(Group(*lines), (0, 0, 1, 2), expand=False), soft_wrap=False)

    for query in (answer(folder, query, sides=("positive",)) for query in folder.queries[:QUESTIONS]):
        console.print(_headline(query), soft_wrap=False)
        raising = query["passages"]
        passages = [p for p in raising if p["duplicate_of"] is None][:best]
        for passage in passages:
            copies = sum(p["duplicate_of"] == passage["rank"] for p in raising)
            show(_line(passage, copies), _excerpt(passage))
        if not passages:
            show(Text("no passage raises this answer", style="dim"))
    if (more := len(folder.queries) - QUESTIONS) > 0:
        console.print(Text(f"and {more:,} more questions, in {folder.path}", style="bold"), soft_wrap=False)
    console.print(Text(f"{sign(folder)} {unit(folder)}", style="dim"), soft_wrap=False)


def verified_summary(told: Json, console: Console) -> None:
    """Print what ``verify.json`` says: how predicted and realised nats agree, of each query and of all."""
    console.print(
        f"{'predicted against realised':30} {'passages':>8} {'pearson':>8} {'slope':>8} {'scale':>8} {'residual':>9}"
    )
    entries: list[Json] = [*told["queries"], {**told, "id": "all questions"}]
    for entry in entries:
        for kind in ("shown", "random"):
            x, name = entry[kind], f"{_safe(str(entry['id']))[:22]} {kind}"
            numbers = " ".join(f"{'-' if x[n] is None else figure(x[n]):>8}" for n in ("pearson", "slope", "scale"))
            residual = figure(entry["residual"]) if entry.get("residual") is not None else ""
            console.print(f"{name:30} {x['pairs']:8} {numbers} {residual:>9}", markup=False)
    if before := told.get("uncalibrated"):
        x, y = (figure(told["shown"][n]) if told["shown"][n] is not None else "-" for n in ("slope", "scale"))
        a, b = (figure(before["shown"][n]) if before["shown"][n] is not None else "-" for n in ("slope", "scale"))
        console.print(
            f"calibrated by held-out energy: slope {a} before, {x} after; scale {b} before, {y} after", markup=False
        )
    console.print(
        "slope and scale: of realised on predicted, with and without an intercept; 1 is calibrated. "
        f"{told['how']}, {told['seconds']:.0f} s", style="dim",
    )  # fmt: skip


def _headline(query: Json) -> Text:
    text, members = _asked(query), query.get("members") or []
    for member in members[:MEMBERS]:
        text.append("\n  ").append_text(_asked(member))
    if members:
        more = f", of which {MEMBERS} are shown" if len(members) > MEMBERS else ""
        text.append(f"\n  {_safe(str(query['id']))}: mean over {len(members)} questions{more}", style="not dim")
    if query.get("direction"):
        name = _safe(Path(query["direction"]).name)
        text.append(f"  along {name} in layer {query['layer']}: {figure(query['measurement'])}", style="not dim")
    if query["log_prob"] is not None:
        measured = "difference of log-probabilities" if query["contrast"] else "log-probability"
        text.append(f"   {measured} {query['log_prob']:.3f} nats", style="not dim")
        if not query["contrast"] and not members:
            text.append(f" (p = {math.exp(min(0.0, query['log_prob'])):.2g})")
    if energies := held_out(query["solution"]):
        energy, plain, scale = figure(energies[0]), figure(energies[1]), figure(energies[2], 2)
        text.append(f"\nheld-out energy {energy} (gradient {plain}), best scale {scale}", style="not dim")
    return text


def _asked(query: Json) -> Text:
    text = Text(_safe(query["prompt"] or ""), style="dim", end="\n")
    text.append(_safe(query["completion"] or ""), style="bold not dim")
    contrasts = query["contrast"] if isinstance(query["contrast"], list) else [query["contrast"]]
    if said := [repr(_safe(x).strip()) for x in contrasts if x]:
        text.append(f"  rather than {' or '.join(said)}")
    return text


def _line(passage: Json, copies: int) -> Text:
    raw, nats = (
        None if x is None else f"{x:+,.0f}" if abs(x) >= 1000 else f"{x:+.3g}"
        for x in (passage["score"], shown_nats(passage))
    )
    text = Text(f"{passage['rank']}. ", style="bold")
    text.append(f"{nats} nats" if nats else f"raw {raw}", style="bold")
    facts = [f"raw {raw}"] if nats else []
    facts += [_safe(str(passage["document"]))]
    facts += [_safe(f"{value}") for value in list(passage["metadata"].values())[:2] if isinstance(value, (str, int))]
    facts += [f"×{copies + 1} near-duplicates"] if copies else []
    facts += ["spurious: few tokens hold it all"] if passage["spurious"] else []
    text.append("  " + " · ".join(fact[:60] for fact in facts), style="dim")
    return text


def _excerpt(passage: Json) -> Text:
    """Cut out about 280 characters from the start of the sentence with the largest sum."""
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
    """Choose a background from black towards blue (raises) or red (lowers); small shares stay plain."""
    if abs(share) < 0.08:
        return None
    red, green, blue = (round(channel * (0.25 + 0.75 * abs(share))) for channel in (RAISES if share > 0 else LOWERS))
    return Style(bgcolor=f"rgb({red},{green},{blue})", color="black" if abs(share) > 0.5 else "white")


def _safe(text: str) -> str:
    return UNSAFE.sub(" ", text)


def audit_summary(found: Audit, console: Console, rows: int = 10) -> None:
    """The most suspect records of an audit, a line each."""
    frame = found.frame().dropna(axis=1, how="all").head(rows)
    console.print(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}"), markup=False)
