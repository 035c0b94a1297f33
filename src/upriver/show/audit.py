"""What an audit leaves to be looked at: its table, the user's own records with what was found of them, and a page.

The page is one file that loads nothing; texts reach it escaped, and its one script is admitted by its hash.
"""

import base64
import hashlib
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from upriver.errors import InputError
from upriver.runtime.artifact import Manifest, atomic, read_head
from upriver.show.folder import read_columns
from upriver.show.page import code
from upriver.text.corpus import Corpus
from upriver.text.examples import Examples
from upriver.text.records import Record, dump, jsonable

SHOWN = 4000  # characters of a text on the page
CHUNK = 1000  # records written at once
LOOKS = {
    "suspicion": "share of the records that are no more suspect",
    "self_influence": "what one more copy would change of the record's own loss, raw",
    "loss": "of the record, in nats, summed over its answer",
    "gradient_norm": "of the record's loss in the tracked layers",
    "harm": "minus the mean influence on the failed samples, raw: positive means that training on the record lowers them",
}
GIVE = "give the folder that `upriver audit` wrote"


class Card(NamedTuple):
    """What the page shows of a record: named parts of its text, or an image as a data URI."""

    name: str
    parts: list[tuple[str, str]]
    image: str = ""


class Audit:
    """The finished results of ``upriver audit``.

    Example:
        >>> up.Audit("audit").frame().head(20)  # a pandas frame, the most suspect first

    Raises:
        InputError: the folder holds no finished audit.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "manifest.json").exists():
            raise InputError(f"no finished audit: got {self.path}; {GIVE}")
        self.manifest = read_head(self.path / "manifest.json", Manifest, f"not an audit: got {self.path}; {GIVE}")
        if self.manifest["key"]["stage"] != "audit":
            raise InputError(f"not an audit: got {self.path}, of a {self.manifest['key']['stage']}; {GIVE}")

    @property
    def page(self) -> Path:
        return self.path / "audit.html"

    def frame(self) -> pd.DataFrame:
        """``row, suspicion, self_influence, loss, gradient_norm, harm``, the most suspect record first."""
        return read_columns(self.path / "audit.parquet", None)


# ---- records


def write_records(
    folder: Path, data: Corpus, frame: pd.DataFrame, shown: set[int]
) -> tuple[dict[int, Card], dict[str, str]]:
    """The user's own records in their order, with the columns of the audit.

    Gives the cards of those that are shown, and what each column is named in the records.

    Parquet stays Parquet, all else becomes JSON lines.  A column whose name is a field of the records begins with ``audit_``;
    a record without loss has none.
    """
    found = {int(row["row"]): row for row in frame.to_dict("records")}
    taken = {name for record in data.records() for name in record.row}
    columns = [name for name in frame.columns if name != "harm" or bool(frame["harm"].notna().any())]
    names = {name: f"audit_{name}" if name in taken else name for name in columns}
    cards: dict[int, Card] = {}
    with _writer(folder, data, list(names.values())) as add:
        for row, record in enumerate(data.records()):
            of_row = found.get(row, {"row": row})
            add(record.row | {names[name]: of_row.get(name) for name in columns})
            if row in shown:
                cards[row] = _card(record)
    return cards, names


@contextmanager
def _writer(folder: Path, data: Corpus, added: list[str]) -> Iterator[Any]:
    sources = data.sources()
    if all(source.kind == "parquet" for source in sources):
        schema = pa.unify_schemas([pq.read_schema(source.path) for source in sources])
        for name in added:
            schema = schema.append(pa.field(name, pa.int64() if name.endswith("row") else pa.float64()))
        held: list[dict[str, Any]] = []
        with (
            atomic(folder / "records.parquet") as temporary,
            open(temporary, "wb") as sink,
            pq.ParquetWriter(sink, schema) as table,
        ):

            def add(row: dict[str, Any] | None) -> None:
                held.extend([] if row is None else [row])
                if len(held) == CHUNK or row is None:
                    table.write_table(pa.Table.from_pylist(held, schema))
                    held.clear()

            yield add
            add(None)
    else:
        with atomic(folder / "records.jsonl") as temporary, open(temporary, "wb") as sink:
            yield lambda row: sink.write(dump(jsonable(row)))


def _card(record: Record) -> Card:
    if "messages" in record.parts:
        parts = [(message["role"], message.get("content") or "") for message in record.parts["messages"]]
    elif "tokens" in record.parts:
        parts = [("input_ids", " ".join(map(str, record.parts["tokens"][:SHOWN].tolist())))]
    else:
        parts = list(record.parts.items())
    return Card(record.id, [(name, _cut(text)) for name, text in parts])


def _cut(text: str) -> str:
    text = text.encode(errors="replace").decode()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text) - SHOWN:,} more characters)"


# ---- labelled examples


def cards_of_examples(data: Examples, rows: list[int], predicted: list[str]) -> dict[int, Card]:
    """Labels and predictions of some examples, and what looks like an image as one."""
    cards = {}
    for row, says in zip(rows, predicted, strict=True):
        parts = [(name, _value(x[row].cpu().numpy())) for name, x in data.inputs.items() if x[row].numel() <= 12]
        image = next((_image(x[row].cpu().numpy()) for x in data.inputs.values() if x[row].numel() > 12), "")
        cards[row] = Card("", [*parts, ("model", says)] if says else parts, image)
    return cards


def _value(x: np.ndarray) -> str:
    return ", ".join(f"{v:.4g}" for v in x.reshape(-1).tolist())


def _image(x: np.ndarray) -> str:
    """A grey image of the numbers, if they can be laid out as a square: a PNG in a data URI."""
    side = round(x.size**0.5)
    if side * side != x.size:
        return ""
    low, high = float(x.min()), float(x.max())
    grey = ((x.reshape(side, side).astype(np.float64) - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in grey)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


# ---- the page


def write_page(folder: Path, frame: pd.DataFrame, cards: dict[int, Card], head: dict[str, Any]) -> None:
    """``audit.html``: the most suspect records, which can be sorted by every measure."""
    columns = [name for name in LOOKS if name != "harm" or head["queries"]]
    rows = [{**row, "row": int(row["row"]), "card": cards[int(row["row"])]} for row in frame.to_dict("records")]
    script = code("audit.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    html = environment.from_string(code("audit.html.j2")).render(
        title=f"Upriver audit · {head['model']} · {head['data']}",
        head=head,
        columns={name: (name.replace("_", " "), LOOKS[name]) for name in columns},
        rows=rows,
        style=code("audit.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        by=head["by"].replace("_", "-").replace("+", " and "),
    )
    with atomic(folder / "audit.html") as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace", newline="\n")
