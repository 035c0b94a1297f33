"""The options of every verb, validated once, and the conventions that every artifact is made under."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from upriver.errors import ConfigError

CONVENTIONS = {
    "loss": "sum of -log p over the loss tokens of a sequence",
    "measurement": "sum of log p over the completion's tokens",
    "sign": "positive: training on the sequence raises the measurement",
    "positions": "A and S average over all real positions, the same for both",
    "fisher": "one sampled label a loss position, never fed back; other draws in the correction pass",
    "lam": "mean over sequences of squared rotated gradients, tokens summed before squaring",
    "bias": "last column of the weight",
    "damping": "relative to the mean of lam, layer by layer, or absolute",
    "accumulation": "float32 or wider",
}
UNIT_TOKENS = (
    65_536  # work that a kill can cost; with it artifact.SCHEMA must change: a run in progress counts in units
)
COMMIT_SHARE = 0.05  # of the time, at most, goes into writing sums
# tokens of a batch: two cores are as fast with 1,024 as with 4,096, and activations take memory; a GPU wants more
BATCH_TOKENS, ACCELERATOR_TOKENS = 2048, 16_384
POSITIVE = "Positive means: training on this passage raises the probability of the answer."
MEASURED = "Positive means: training on this example raises the measurement."  # of tasks that are no language model
MIXED = "mixed"  # the model in float32, and products over what its layers saw in bfloat16
Dtype = Literal["float32", "bfloat16", "mixed", "float64"]
CurvatureKind = Literal[
    "ekfac", "kfac", "diagonal", "identity", "exact", "arnoldi", "nystrom", "cg", "lissa", "astra", "tracincp"
]
CURVATURES: tuple[str, ...] = get_args(CurvatureKind)
SELF = "@self"  # column of ``scores.parquet`` with the self-influence of the sequences
PLAIN_GRADIENTS = ("identity", "tracincp")  # invert nothing, so that damping means nothing and scores are in no unit
HELD_OUT = (
    30_000,
    8,
)  # tokens that a solution is judged on by default, for so many questions; fewer tokens for more of them
PLAIN = {
    "Input should be": "allowed is", "a valid integer": "a whole number", "a valid string": "a text",
    "a valid boolean": "true or false", "a valid dictionary": "a table of names and values",
}  # fmt: skip
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
Config = TypeVar("Config", bound="Options")


def parse_damping(value: Any) -> tuple[float, bool]:
    """The number, and whether it is a multiple of the mean eigenvalue (``0.1x``).

    Raises:
        ValueError: not a number from 0.
    """
    text = str(value).strip()
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError("a number from 0, or a share of the mean eigenvalue such as 0.1x")
    return number, text.endswith("x")


def parse_memory(text: str | None) -> int | None:
    """Bytes of a size such as ``8GB``, ``2GiB`` or ``500MB``; None where none is given.

    Raises:
        ConfigError: not a positive number with one of the units.

    Example:
        >>> parse_memory("8GB")
        8000000000
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "?")
    if unit not in UNITS or not 1 <= number * UNITS[unit] < 2**63:
        raise ConfigError(f"bad size of memory: got {text!r}; give a number with its unit, such as 8GB, 2GiB or 500MB")
    return int(number * UNITS[unit])


def _size(memory: str | None) -> str | None:
    parse_memory(memory)
    return memory


class Options(BaseModel):
    """Base of the option sets: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @property
    def batch(self) -> int:
        """Tokens of a batch, once it is settled on which device (:meth:`upriver.Model.settled`)."""
        return int(getattr(self, "batch_tokens", None) or BATCH_TOKENS)

    def key(self) -> dict[str, Any]:
        """What a result depends on: not how much memory it was made in, nor what a kill could have cost."""
        return self.model_dump(exclude={"memory", "unit_tokens"})


class FitOptions(Options):
    """What :func:`upriver.fit` may be told."""

    layers: str | None = None  # None: what an adapter trained, else mlp
    fisher: Literal["sampled", "empirical", "exact"] = "sampled"
    draws: int = Field(1, ge=1)  # of sampled labels, whose mean is taken
    max_tokens: int | None = Field(1_000_000, ge=1)
    until: float | None = Field(None, gt=0, le=1)
    blocks: int = Field(1, ge=1)  # along the diagonals of A and S; what is between them is left out
    dtype: Dtype | None = None  # None: float32; on a GPU, that of the model
    tf32: bool = False  # products of float32 on CUDA may be rounded to TF32
    batch_tokens: int | None = Field(None, ge=1)  # None: 2,048; on a GPU 16,384
    seed: int = Field(0, ge=0, lt=2**63)
    memory: str | None = None
    unit_tokens: int = Field(UNIT_TOKENS, ge=1)

    _memory = field_validator("memory")(_size)

    @field_validator("draws")
    @classmethod
    def _draws(cls, value: int, given: ValidationInfo) -> int:
        if value > 1 and given.data.get("fisher") != "sampled":
            raise ValueError("several draws go with --fisher sampled alone, leave them out")
        return value


class TraceOptions(Options):
    """What :func:`upriver.trace` may be told."""

    curvature: CurvatureKind = "ekfac"
    refine: int | Literal["auto"] = 0  # steps of conjugate gradients from the solution of the curvature
    refine_tokens: int | None = Field(None, ge=1)  # that a matrix-free solver goes over; None: the fit's sample
    combine: int = Field(0, ge=0)  # tokens on which solutions at several dampings are combined; 0: one damping
    solver_rank: int | None = Field(None, ge=1)  # of arnoldi and nystrom
    solver_steps: int | None = Field(None, ge=1)  # of cg, lissa and astra, at most
    damping: str = "0.1x"  # or several, separated by commas: a column for each
    rank: int | Literal["full"] = 32
    top: int = Field(100, ge=1)
    candidates: int | None = Field(None, ge=1)
    held_out: int | None = Field(None, ge=0)  # tokens that judge the solutions; 0: none
    n_train: int | None = Field(
        None, ge=1
    )  # sequences trained on; None: of the corpus that the factors were fitted for
    layer_scores: bool = False
    unit_norm: bool = False  # further columns, of scores between -1 and 1
    layers: str | None = None  # None: those of the factors, else as of a fit
    dtype: Dtype | None = None  # of the scan; None: that of the factors, else of the model
    tf32: bool | None = None  # None: that of the factors, else False
    batch_tokens: int | None = Field(None, ge=1)  # None: as of a fit
    seed: int | None = Field(None, ge=0, lt=2**63)  # None: that of the factors, else 0
    memory: str | None = None
    unit_tokens: int = Field(UNIT_TOKENS, ge=1)

    @property
    def dampings(self) -> list[str]:
        return self.damping.split(",")

    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        if value == "full":
            return value
        if not str(value).isdecimal() or int(value) < 1:
            raise ValueError("a whole number from 1, or full")
        return int(value)

    @field_validator("refine", mode="before")
    @classmethod
    def _refine(cls, value: Any) -> Any:
        if value != "auto" and not str(value).isdecimal():
            raise ValueError("a whole number from 0, or auto")
        return value if value == "auto" else int(value)

    @field_validator("damping", mode="before")
    @classmethod
    def _damping(cls, value: Any) -> str:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        texts = [str(part).strip() for part in parts]
        if len(set(map(parse_damping, texts))) != len(texts):
            raise ValueError("each damping once")
        return ",".join(texts)

    _memory = field_validator("memory")(_size)


class AuditOptions(Options):
    """What :func:`upriver.audit` may be told; the rest of a fit and a trace is as by default."""

    by: Literal["self_influence", "loss", "gradient_norm", "harm"] | None = None  # None: see `upriver.audit`
    top: int = Field(100, ge=1)  # records on the page
    curvature: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac"
    damping: str = "0.1x"
    rank: int | str = 32  # of the failed samples
    layers: str | None = None  # None: those of the factors, else as of a fit; of labelled examples all
    max_tokens: int = Field(1_000_000, ge=1)  # of its own fit
    dtype: Dtype | None = None
    batch_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    memory: str | None = None
    unit_tokens: int = Field(UNIT_TOKENS, ge=1)

    _memory = field_validator("memory")(_size)


class VerifyOptions(Options):
    """What :func:`upriver.verify` may be told."""

    how: Literal["proximal", "finetune"] = "proximal"
    top: int = Field(5, ge=1)  # passages of each side of a question
    random: int | None = Field(None, ge=0)  # None: as many as are shown
    steps: int = Field(10, ge=1)  # of conjugate gradients, at most
    tokens: int = Field(6000, ge=1)  # of the sample that is solved on, and of the one that sets the length
    seed: int = Field(0, ge=0, lt=2**63)


class RunOptions(FitOptions, TraceOptions):
    """A run file: fit + trace + report, and verify where it is asked for, with the same keys as the flags."""

    layers: str | None = None
    tf32: bool = False
    seed: int = Field(0, ge=0, lt=2**63)
    model: str
    base: str | None = None
    tokenizer: str | None = None
    corpus: str
    queries: str
    out: str
    seq_len: int = Field(512, ge=2)
    pack: bool = False
    on_bad_record: Literal["error", "skip"] = "error"
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    split: str | None = None
    token_dtype: Literal["uint16", "uint32"] | None = None
    complete: int | None = Field(None, ge=1)
    samples: str | None = None
    as_set: str | None = None
    device: str = "auto"
    verify: dict[str, Any] | None = None  # flags of verify, which then comes before the report


def default_how(gpu: bool, dtype: str | None, batch_tokens: int | None, own: str) -> dict[str, Any]:
    """The compute type and the tokens of a batch that suit a device, where none are named; ``own`` type of the model."""
    named = {"dtype": dtype, "batch_tokens": batch_tokens}
    suits = {"dtype": own if gpu else "float32", "batch_tokens": ACCELERATOR_TOKENS if gpu else BATCH_TOKENS}
    return {name: suits[name] if value is None else value for name, value in named.items()}


def weights_in(dtype: str) -> str:
    """The type of the model's weights where the compute type is ``dtype``."""
    return "float32" if dtype == MIXED else dtype


def options(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Validate ``values`` as options of ``kind``.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value that is not allowed.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(where + "; ".join(_sentence(kind, e) for e in error.errors()[:1])) from error


def _sentence(kind: type[Options], error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else "?"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, 1)
        return f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")
    if error["type"] == "missing":
        return f"the option {name!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    for theirs, ours in PLAIN.items():
        message = message.replace(theirs, ours)
    return f"bad value for {name!r}: got {error['input']!r}; {message}"
