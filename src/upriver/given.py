"""What a command is given, read and told of: the model, the corpus and the queries."""

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upriver.curvature.factors import Factors
from upriver.errors import ConfigError, StorageError
from upriver.model.generate import complete
from upriver.model.load import Model, Place
from upriver.runtime.artifact import load_json, plain, refuse_inside
from upriver.runtime.config import weights_in
from upriver.runtime.system import give_back, resident_memory
from upriver.show.terminal import running_bar, say
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries
from upriver.text.reading import Reading
from upriver.text.tables import SEPARATORS

LARGEST_RUN_FILE = 1 << 20  # bytes


def read_run_file(file: Path) -> dict[str, Any]:
    """What a run file says."""
    try:
        with open(plain(file), "rb") as opened:
            text = opened.read(LARGEST_RUN_FILE + 1)
        if len(text) > LARGEST_RUN_FILE:
            raise ConfigError(
                f"the run file is too large: got {file} of more than 1 MB; give a file of keys and values"
            )
        return tomllib.loads(text.decode())
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"cannot read the run file {file}: {why}; give a TOML file that you may read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}; write each flag as key = value") from error


def read_for_others(
    corpus: str,
    model: Model,
    seq_len: int,
    reading: dict[str, Any] | None = None,
    resident: Callable[[], int | None] = resident_memory,
) -> tuple[Corpus, int]:
    """Read the corpus, and measure what that has left in memory: a fit and a trace after this find its tokens made."""
    give_back()
    before = resident() or 0
    data = read_corpus(corpus, model, seq_len, reading or {})
    give_back()
    return data, 0 if data.reused or model.device.type == "cuda" else max(0, (resident() or 0) - before)


def query_size(queries: str, model: Model | Path) -> dict[str, int]:
    """Count the queries, and their tokens where that can be told."""
    if queries.isdecimal():
        return {"queries": int(queries)}
    if isinstance(model, Path):
        raise ConfigError(f"no tokenizer to read queries with: got {queries!r}; give their number")
    read = Queries.read(queries, model.tokenizer, complete=1)
    if read.needs_completion:
        return {"queries": len(read)}
    return {"queries": len(read), "query_tokens": max(1, round(float(read.lengths.mean())))}


def read_model(place: Place, device: str, dtype: str | None) -> Model:
    """The model in the type that it will compute in, so that it is there once."""
    model = place.load(dtype and weights_in(dtype), device)
    what = f"{model.info['architecture']}, {model.n_parameters:,} parameters, {model.attention} attention"
    over = f", an adapter ({model.info['adapter']}) over {model.info['base']}" if "adapter" in model.info else ""
    say(f"model: {place.name}, {what}{over}")
    return model


def read_corpus(
    path: str, model: Model, seq_len: int | None, reading: dict[str, Any], factors: Factors | None = None
) -> Corpus:
    """Read a corpus and say what it is: as that of the factors, where there are some, but for what is named."""
    how = how_read(factors, seq_len, reading)
    if how["on_bad_record"] not in ("error", "skip"):
        raise ConfigError(f"bad value for --on-bad-record: got {how['on_bad_record']!r}; error or skip")
    check_seq_len(model, how["seq_len"])
    with running_bar("corpus (bytes)") as progress:
        corpus = Corpus.read(path, model.tokenizer, progress=progress, **how)
    say(f"corpus: {path}, {corpus.n_documents:,} documents, {len(corpus):,} sequences, {corpus.n_tokens:,} tokens")
    _say_files(corpus.info["sources"], corpus.info["left_out"])
    for note in corpus.info["notes"]:
        say(f"corpus: {note}")
    for name, separator in corpus.info.get("separators", {}).items():
        say(f"the cells of {name} are separated by {SEPARATORS[separator]}s")
    skipped = corpus.info["skipped"]
    if skipped["count"]:
        say(f"skipped {skipped['count']:,} bad records; the first:")
        for bad in skipped["first"]:
            say(f"  {bad['where']}: {bad['reason']}")
    return corpus


def _say_files(read: dict[str, Any], left: dict[str, Any]) -> None:
    if read["count"] > 1 or left["count"]:
        parts = [f"{name} {count:,}" for name, count in read["documents"].items()]
        more = f", and {read['count'] - len(parts):,} more files" if read["count"] > len(parts) else ""
        unlisted = left["count"] - len(left["first"])
        out = f"; left out: {', '.join(left['first'])}" if left["count"] else ""
        out += f", and {unlisted:,} more" if unlisted else ""
        say(f"corpus: documents of each file: {', '.join(parts)}{more}{out}")


def how_read(factors: Factors | None, seq_len: int | None, reading: dict[str, Any]) -> dict[str, Any]:
    """How a corpus is read that is looked at with some factors: as that which they were fitted on, but for what is named."""
    named = {name: value for name, value in reading.items() if value is not None}
    how = factors.reading if factors else Reading(seq_len or 512)._asdict()
    if any(name.endswith("_field") for name in named):  # another corpus, whose fields have other names
        how |= {name: None for name in how if name.endswith("_field")}
    how |= named
    if seq_len not in (None, how["seq_len"]):
        raise ConfigError(
            f"bad value for --seq-len: got {seq_len}; the factors were fitted on sequences of {how['seq_len']}, leave it out"
        )
    return how


def check_seq_len(model: Model, seq_len: int) -> None:
    if model.positions and seq_len > model.positions:
        most = f"the model takes at most {model.positions} tokens, give --seq-len {model.positions} or less"
        raise ConfigError(f"bad value for --seq-len: got {seq_len}; {most}")


def answered(queries: Queries, model: Model, most: int | None) -> Queries:
    """The queries with their tokens, and with the model's own answers where they have none."""
    for note in queries.notes:
        say(f"queries: {note}")
    queries = queries.bound(model.tokenizer, model.longest)
    return complete(model, queries, most) if most is not None and queries.needs_completion else queries


def check_plan_file(out: Path) -> None:
    """Refuse a file for a plan that would replace anything but an earlier plan."""
    if not out.parent.is_dir():
        raise ConfigError(
            f"bad value for --out: got {str(out)!r}; there is no folder {str(out.parent)!r}, make it first"
        )
    refuse_inside(out)
    if os.path.lexists(out):
        try:
            found = load_json(out)
        except StorageError:
            found = None
        if not isinstance(found, dict) or not {"machine", "passes", "seconds", "peak_bytes", "advice"} <= found.keys():
            raise ConfigError(
                f"bad value for --out: got {str(out)!r}, which is there and is no plan; choose another file, or move it away"
            )


def read_checkpoints(text: str | None) -> list[tuple[str, float]]:
    """``FOLDER=RATE,FOLDER=RATE``: the folders of checkpoints with their learning rates."""
    found = []
    for part in text.split(",") if text else ():
        folder, _, rate = part.rpartition("=")
        try:
            found.append((folder.strip(), float(rate)))
        except ValueError:
            found = [("", 0.0)]
        if not found[-1][0] or not 0 < found[-1][1] < float("inf"):
            raise ConfigError(f"bad value for --checkpoints: got {part!r}; give each as FOLDER=LEARNING_RATE")
    return found
