"""What the heads of artifacts hold, and the one place where a head is judged: ``key.json``, ``manifest.json``, ``info.json``."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from upriver.errors import InputError, MismatchError
from upriver.runtime.config import FitOptions
from upriver.runtime.files import ADVICE, load_json, read_json, unreadable

SCHEMA = 4  # raise it when the files of an artifact change
Json = dict[str, Any]


class Head(BaseModel):
    """What every head holds; further entries are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)
    of_stage: ClassVar[str] = ""  # of all stages


class Key(Head):
    """``key.json``: what a stage is made from."""

    stage: str


class FitKey(Key):
    model: str
    corpus: str
    kernel: str
    options: FitOptions
    conventions: Json


class LayerHead(Head):
    name: str
    shape: list[int] = Field(min_length=2, max_length=2)
    block: int | None
    A_of: str
    pool: str = ""


class CoverageHead(Head):
    tracked: int
    total: int
    share: float
    untracked: list[Json]


class HalvesHead(Head):
    mean: float | None
    worst: float | None
    what: str


class SampleHead(Head):
    sequences: int
    tokens: int
    halves: HalvesHead


class Manifest(Head):
    """``manifest.json``: the key again, what was measured, and the checksums of the files."""

    key: Key
    files: dict[str, str]


class FitManifest(Manifest):
    of_stage = "fit"
    key: FitKey
    layers: list[LayerHead] = Field(min_length=1)
    coverage: CoverageHead
    fit: SampleHead
    data: Json


class TraceManifest(Manifest):
    """What a report shows of these entries it leaves out where they are not there."""

    of_stage = "trace"
    n_train: int | None = None
    curvature: str | None = None
    damping: str | None = None
    sign: str | None = None
    model: Json | None = None
    corpus: Json | None = None
    layers: list[Json] | None = None
    coverage: Json | None = None
    fit: Json | None = None
    versions: dict[str, str] | None = None


class Info(Head):
    """``info.json`` of a corpus."""

    of_stage = "corpus"
    fingerprint: str
    documents: int
    sequences: int
    tokens: int
    max_token: int
    seq_len: int
    pack: bool
    on_bad_record: str
    text_field: str | None
    prompt_field: str | None
    completion_field: str | None
    split: str | None
    token_dtype: str | None
    sources: Json
    shard: list[Any] | None
    notes: list[str]
    skipped: Json
    dtype: Literal["<u2", "<u4"]
    files: dict[str, str]


MANIFESTS: dict[str, type[Manifest]] = {"fit": FitManifest, "trace": TraceManifest}


def read_head(path: Path, kind: type[Head], foreign: str, advice: str = ADVICE) -> Json:
    """The head of an artifact, its checksum, version and structure verified.

    Args:
        foreign: the sentence for what is no such head.
        advice: what to do about one that is damaged, or of another version.

    Raises:
        InputError: ``foreign``, or another version wrote it.
        StorageError: it is damaged, or of another run than ``key.json`` beside it.
    """
    value = load_json(path, advice)
    key = value.get("key", value) if isinstance(value, dict) else None
    stage = key.get("stage") if isinstance(key, dict) else None
    if not isinstance(key, dict) or not isinstance(stage, str) or kind.of_stage not in ("", stage):
        raise InputError(foreign)
    found = key.get("schema")
    if type(found) is int and found != SCHEMA:
        age = "an older" if found < SCHEMA else "a newer"
        raise MismatchError(
            f"{path.parent} was written by {age} version of this program: got schema {found}, this one reads {SCHEMA}; {advice}"
        )
    value = read_json(path, advice)
    if path.name == "manifest.json" and value.get("key") != read_json(path.with_name("key.json"), advice):
        raise unreadable(path, "it is of another run than the key.json beside it", advice)
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "it"
        raise unreadable(
            path, f"its entry {name!r} is not as this version writes it ({first['msg']})", advice
        ) from error
    return value
