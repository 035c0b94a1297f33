"""``report.html``: one file with script, style and data inside it, that opens from disk and loads nothing."""

import base64
import gzip
import hashlib
import json
import math
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import numpy as np

from upriver.show.folder import Json

SCRIPTS = ("charts.js", "detail.js", "viewer.js")
COMPRESS_ABOVE = 300_000  # characters of JSON: above it the data is gzipped
QUANTISE_ABOVE = 3_000_000  # bytes of the page: above it token scores are stored in 8 bits
WARN_ABOVE = 5_000_000  # bytes of the page
DIGITS = 4  # of a token score in the page


class Page(NamedTuple):
    html: str
    quantised: bool
    size: int


def render(report: Json, title: str = "Upriver") -> Page:
    """The page that shows ``report`` (the content of ``report.json``).

    Corpus text reaches the browser only as JSON in a data block, where ``<`` is written ``\\u003c``; the script puts it
    on the page as text.  The content-security policy admits this one script, by its hash, and no network.
    """
    page = _page(report, title, quantise=False)
    if page.size > QUANTISE_ABOVE:
        page = _page(report, f"{title} (token scores quantised to 8 bits)", quantise=True)
    return page


def _page(report: Json, title: str, quantise: bool) -> Page:
    data = dumps(_payload(report, quantise))
    packed = len(data) > COMPRESS_ABOVE
    script = code(*SCRIPTS)
    html = _template().render(
        title=title,
        style=code("viewer.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        encoding="gzip" if packed else "plain",
        data=base64.b64encode(gzip.compress(data.encode(), 6, mtime=0)).decode() if packed else data,
    )
    return Page(html, quantise, len(html.encode()))


def code(*names: str) -> str:
    """Our own files of the page, one after the other."""
    folder = resources.files("upriver.show") / "viewer"
    return "\n".join((folder / name).read_text(encoding="utf-8").strip() for name in names)


def dumps(value: Any) -> str:
    """JSON that is inert inside HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(code("page.html.j2"))


def _payload(report: Json, quantise: bool) -> Json:
    """The report as the page holds it: no manifest, no text that the tokens repeat, token scores rounded."""
    queries = [{**q, "passages": [_passage(p, quantise) for p in q["passages"]]} for q in report["queries"]]
    return {key: value for key, value in report.items() if key != "manifest"} | {
        "queries": queries,
        "quantised": quantise,
    }


def _passage(passage: Json, quantise: bool) -> Json:
    scores = passage["token_scores"]
    kept = {
        key: value for key, value in passage.items() if key != "text" or passage["text"] != "".join(passage["tokens"])
    }
    return kept | {"token_scores": quantised(scores) if quantise and scores else [rounded(s) for s in scores]}


def rounded(score: float | None) -> float | int:
    value = float(f"{score or 0:.{DIGITS}g}")
    return int(value) if value == 0 else value


def quantised(scores: list[float]) -> Json:
    """Signed bytes, base64, and the value of one step: ``score = byte * step``, off by half a step at most."""
    values = np.nan_to_num(np.asarray(scores, np.float64))
    step = float(np.abs(values).max()) / 127 or 1.0
    codes = np.round(values / step).astype(np.int8)
    return {"step": step if math.isfinite(step) else 1.0, "bytes": base64.b64encode(codes.tobytes()).decode()}
