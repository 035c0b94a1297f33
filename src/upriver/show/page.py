"""The page of a report: one file that loads nothing, with each question in a block that is unpacked when it is asked for."""

import base64
import gzip
import hashlib
import json
import math
import re
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from upriver.show.folder import Json

SCRIPTS = ("charts.js", "detail.js", "viewer.js")
COMPRESS_ABOVE = 30_000  # characters of JSON: above it a question is gzipped
OPERATORS = ("=>", "&&", "||", "??", "===", "!==")  # of our script
DIGITS = 4  # of a token score in the page
MARKS = ("|", "¦", "\ue000")  # between tokens on the page, the first that is in none of them


def render(head: Json, questions: list[Json], blocks: list[str], title: str = "Upriver", quantise: bool = False) -> str:
    """Make the page: what is said of the run and of all questions at once, and the ``blocks`` of single questions.

    Corpus text reaches the browser only as JSON in data blocks, where ``<`` is written ``\\u003c``; the script puts it
    on the page as text.  The content-security policy admits this one script, by its hash, and no network.
    """
    shown = {key: value for key, value in head.items() if key != "manifest"} | {
        "queries": questions,
        "quantised": quantise,
    }
    script = code(*SCRIPTS)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(code("page.html.j2")).render(
        title=f"{title} (token scores quantised to 8 bits)" if quantise else title,
        style=code("viewer.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_inert(shown),
        blocks="\n".join(blocks),
    )


def block(query: Json, number: int, quantise: bool) -> str:
    """One question as a data block of the page, gzipped where it is large."""
    data = _inert(query | {"passages": [_passage(p, quantise) for p in query["passages"]]})
    packed = len(data) > COMPRESS_ABOVE
    text = base64.b64encode(gzip.compress(data.encode(), 6, mtime=0)).decode() if packed else data
    kind = f'data-encoding="{"gzip" if packed else "plain"}"'
    return f'<script type="application/json" id="question-{number}" {kind}>{text}</script>'


def _inert(value: Json) -> str:
    """JSON that means nothing to HTML."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


def listed(query: Json) -> Json:
    """What the list of questions shows of one."""
    short = {"prompt": (query["prompt"] or "")[-90:], "completion": (query["completion"] or "")[:90]}
    kept = ("id", "log_prob", "measurement")
    return (
        {key: query[key] for key in kept}
        | short
        | {"contrast": bool(query["contrast"]), "members": len(query.get("members") or [])}
    )


def code(*names: str) -> str:
    """Read our own files of the page, one after the other, without comments and the white space that only we need.

    No text in them goes over a line, and none holds one of ``OPERATORS`` between spaces, or a brace beside one.
    """
    folder = resources.files("upriver.show") / "viewer"
    lines = "\n".join((folder / name).read_text(encoding="utf-8") for name in names).splitlines()
    text = "\n".join(line for line in map(str.strip, lines) if line and not line.startswith("// "))
    if names[0].endswith(".css"):
        return re.sub(r" ?([{}]) ?|([:;,]) ", r"\1\2", text).replace(";}", "}")
    if names[0].endswith(".js"):
        text = re.sub(r"([{(,;])\n|(\{) | (\})", r"\1\2\3", text)
        for operator in OPERATORS:
            text = text.replace(f" {operator} ", operator)
    return text


def _passage(passage: Json, quantise: bool) -> Json:
    """Shorten a passage for the page: tokens in one text, which the passage's own repeats, and token scores rounded."""
    kept, tokens = dict(passage), passage["tokens"]
    if passage["text"] == "".join(tokens):
        del kept["text"]
    mark = next((x for x in MARKS if not any(x in token for token in tokens)), None)
    if tokens and mark:
        kept |= {"tokens": mark.join(tokens), "mark": mark}
    if quantise and passage["token_scores"]:
        return kept | {"token_scores": quantised(passage["token_scores"]), "layers": _rounded(passage["layers"])}
    return kept | {"token_scores": _rounded(passage["token_scores"])}


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{x or 0:.{DIGITS}g}") or 0 for x in values]


def quantised(scores: list[float]) -> dict[str, Any]:
    """Store scores as signed bytes, in base64, and the value of one step; they are off by half a step at most."""
    values = np.nan_to_num(np.asarray(scores, np.float64))
    step = float(np.abs(values).max()) / 127 or 1.0
    codes = np.round(values / step).astype(np.int8)
    return {"step": step if math.isfinite(step) else 1.0, "bytes": base64.b64encode(codes.tobytes()).decode()}
