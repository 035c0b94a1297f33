"""Load a causal language model of ``transformers`` with its tokenizer, and refuse what would give wrong numbers."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from upriver.errors import ModelError
from upriver.model.adapter import Adapter, adapter_at, with_adapter
from upriver.model.fingerprint import tensor_hash
from upriver.model.foreign import check_folder, check_taken
from upriver.model.model import Model, check_causal, checksums, dtype_named
from upriver.model.packed import floating, packed_checkpoint, rest_in
from upriver.model.weights import Checkpoint, leave_files, loses, stored_dtype, weights_of
from upriver.runtime.device import pick_device
from upriver.text.tokenise import largest_token, require_offsets

PLACES = "give a folder written by save_pretrained, a .gguf file"
WORDS = "tokenizer*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"  # files of tokenizers
NOWHERE = "-"  # a folder that is not there
MOST = 240  # characters of what another library says, in a sentence


class Place(NamedTuple):
    """Where a model is, as a command is told: an adapter's base and the tokenizer may be elsewhere."""

    name: str
    base: str | None = None
    tokenizer: str | None = None

    def __str__(self) -> str:
        more = [f"--{flag} {x}" for flag, x in zip(("base", "tokenizer"), self[1:], strict=True) if x]
        return " ".join([self.name, *more])

    def load(self, dtype: str | None, device: str) -> Model:
        return load_model(self.name, dtype, device, base=self.base, tokenizer=self.tokenizer)


def load_model(
    path: str | Path,
    dtype: str | None = None,
    device: str = "auto",
    attention: str = "sdpa",
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """A causal language model and its tokenizer, from a folder, a GGUF file, or a name on the Hugging Face hub.

    Args:
        path: a folder that ``save_pretrained`` wrote, also of an adapter, a ``.gguf`` file or a folder with one, or a hub name.
        dtype: of the weights in memory: float32 or bfloat16 (float64 for tests); None: float32 on the CPU, on a GPU the type that
            they are stored in (bfloat16 for float16 and where the files do not tell).
        device: ``auto`` (a GPU, else the CPU), ``cpu``, ``cuda`` (the process's own under ``torchrun``, else the first) or
            ``cuda:N``.
        attention: the kernel asked for; ``Model.attention`` is what the model really uses.
        base: of an adapter; None: the model beside it, else the one that it names.
        tokenizer: a folder or hub name; None: that of the adapter, else that of the model.

    Raises:
        ConfigError: no such device here, no such dtype, or a base for what is no adapter.
        ModelError: no model there, weights missing or NaN, no fast tokenizer, or a vocabulary that does not fit.
    """
    on = pick_device(device)
    adapter = adapter_at(str(path), None if base is None else str(base))
    try:
        return _load(str(path), dtype, on, attention, adapter, None if tokenizer is None else str(tokenizer))
    except ModelError as error:
        if adapter is None or repr(adapter.place) in str(error):
            raise
        raise ModelError(
            f"{error} (the base of the adapter in {adapter.place!r}; --base PATH names another)"
        ) from error


def _load(
    path: str, dtype: str | None, on: torch.device, attention: str, adapter: Adapter | None, words: str | None
) -> Model:
    place, options = _locate(adapter.base if adapter else path)
    there = {"device_map": {"": on}} if not options and packed_checkpoint(place) else {}  # where weights are packed
    with _quiet():
        tokenizer = _load_tokenizer(*_words(place, options, adapter, words))
        stored = None if options or there else stored_dtype(_folder(place))
        wanted = dtype_named(dtype or _default_dtype(stored, on))
        stored = _finer(stored, stored_dtype(Path(adapter.place))) if adapter else stored
        first = stored if stored and loses(wanted, stored) else wanted
        module = _load_module(place, options, first, attention, there)
        module = with_adapter(module, adapter) if adapter else module
    module = (rest_in(module, wanted) if there else module).eval()
    hashes = leave_files(module, wanted, on)
    held = weights_of(module)
    known = [hashes.get(id(x)) or tensor_hash(x) for x in held.values()] if hashes else []
    source = Checkpoint(partial(_again, place, attention, stored, adapter), stored) if stored else None
    model = Model(module, tokenizer, name=path, source=source, _hashed=(checksums(module), known))
    _check(model, path)
    check_causal(module)
    model.info |= {
        "attention": model.attention,
        "vocabulary": int(module.get_input_embeddings().weight.shape[0]),
        "positions": model.positions,
        "architecture": type(module).__name__,
    }
    model.info |= {"adapter": adapter.kind, "base": adapter.base} if adapter else {}
    model.info |= {"tokenizer": words} if words else {}
    return model


def _finer(one: torch.dtype | None, other: torch.dtype | None) -> torch.dtype | None:
    """The more precise type of two; None where one of them is not known."""
    return None if one is None or other is None else one if loses(other, one) else other


def _words(
    place: str, options: dict[str, Any], adapter: Adapter | None, given: str | None
) -> tuple[str, dict[str, Any]]:
    """Where the tokenizer is: where it was said to be, beside the adapter, or beside the model."""
    beside = adapter and _holds(adapter.place)
    return (given, {}) if given else (adapter.place, {}) if adapter and beside else (place, options)


def _default_dtype(stored: torch.dtype | None, device: torch.device) -> str:
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if stored in (None, torch.float16) else str(stored).removeprefix("torch.")


def _again(place: str, attention: str, dtype: torch.dtype, adapter: Adapter | None) -> nn.Module:
    with _quiet():
        module: nn.Module = _load_module(place, {}, dtype, attention, {})
        return with_adapter(module, adapter) if adapter else module


def _folder(place: str) -> Path:
    """Where the files of a model are: of a name on the hub, what is kept of it here."""
    from transformers.utils.hub import cached_file

    if Path(place).is_dir():
        return Path(place)
    found = cached_file(place, "config.json", _raise_exceptions_for_missing_entries=False)
    return Path(found).parent if found else Path(place)


def _locate(path: str) -> tuple[str, dict[str, Any]]:
    """Where ``from_pretrained`` shall look, and the GGUF file's name when the weights are in one."""
    place = Path(path)
    try:
        if place.suffix == ".gguf" and place.is_file():
            return str(place.parent), {"gguf_file": place.name}
        there, folder, plain = place.exists(), place.is_dir(), (place / "config.json").exists()
        ggufs = sorted(place.glob("*.gguf")) if folder and not plain else []
        if folder:
            check_folder(place)
    except (OSError, ValueError) as error:  # a folder that may not be entered, or what can be no path at all
        shown = path if len(path) < MOST else f"{path[:MOST]} ..."
        raise ModelError(
            f"no model can be looked up: got {shown!r} ({_reason(error)}); {PLACES} that you may read, or a hub name"
        ) from error
    if len(ggufs) > 1:
        raise ModelError(f"{path} holds {len(ggufs)} GGUF files; name one of them, such as {ggufs[0]}")
    if folder and not plain and not ggufs:
        raise ModelError(
            f"no model in the folder: got {path!r} without a config.json or a .gguf file; "
            "give a folder written by save_pretrained"
        )
    if not folder and (there or path[:1] in tuple("./~") or path.count("/") > 1):
        raise ModelError(f"no model at {path!r}; {PLACES}, or a hub name")
    return path, {"gguf_file": ggufs[0].name} if ggufs else {}


def _load_tokenizer(place: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    advice = "put the tokenizer.json that the model was trained with beside it, or name its folder with --tokenizer"
    failed = f"no tokenizer could be loaded from {_shown(place, options)}"
    if Path(place).is_dir() and not (options or _holds(place)):
        raise ModelError(f"{failed}: it holds no file of one; {advice}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here, and a wrong file any of them
        _check_there(place, error)
        lacking = _lacking(Path(place))
        if lacking:
            said = f"{lacking[0]} is read by packages that are not installed; pip install {' '.join(lacking[1:])}"
            raise ModelError(f"{failed}: {said}") from error
        raise ModelError(f"{failed}: {_reason(error)}; {_advice(options, error, advice)}") from error
    require_offsets(tokenizer)
    added = {str(x) for x in tokenizer.added_tokens_decoder.values()}
    if tokenizer.get_vocab().keys() <= added | set(tokenizer.all_special_tokens):  # made up from the model's type alone
        raise ModelError(f"{failed}: its vocabulary would be the {len(tokenizer)} special tokens alone; {advice}")
    return tokenizer


def _holds(place: str) -> bool:
    return any(any(Path(place).glob(name)) for name in WORDS)


def _lacking(place: Path) -> list[str]:
    """A file of SentencePiece or tiktoken in a folder without a tokenizer.json, and the packages that it lacks."""
    files = [] if (place / "tokenizer.json").exists() else sorted([*place.glob("*.model"), *place.glob("*.tiktoken")])
    for file in files:
        pieces = file.read_bytes()[:1] == b"\n"  # a protocol buffer's first field; the other kind is lines of text
        modules = (
            {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"} if pieces else {"tiktoken": "tiktoken"}
        )
        missing = [package for package, module in modules.items() if not _there(module)]
        if missing:
            return [file.name, *missing]
    return []


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _check_there(place: str, error: Exception) -> None:
    """Refuse a name that is neither a folder nor that of a model on the hub, or in what is kept of it here."""
    from transformers import AutoConfig

    try:
        if not Path(place).exists():
            AutoConfig.from_pretrained(place, trust_remote_code=False)
    except OSError:
        raise ModelError(
            f"no such folder, and no such model on the hub here: got {place!r} ({_reason(error)}); {PLACES}, or a hub name"
        ) from error
    except Exception:  # there is one, which cannot be read
        return


def _advice(options: dict[str, Any], error: Exception, otherwise: str) -> str:
    """What to do about a model that cannot be loaded: a GGUF file takes two packages more."""
    lacking = isinstance(error, ImportError) or not all(map(find_spec, ("gguf", "accelerate")))
    return "install what reads GGUF files: pip install 'upriver[gguf]'" if options and lacking else otherwise


def _load_module(place: str, options: dict[str, Any], dtype: torch.dtype, attention: str, there: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    asked = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    asked |= there | {"adapter_kwargs": {"subfolder": NOWHERE}}  # or it would add an adapter that lies beside the model
    try:
        try:
            kernel = {"attn_implementation": attention}
            module, report = load(place, **asked, **kernel, **options)
        except ValueError as error:
            if "attn" not in str(error) and "attention" not in str(error):
                raise
            module, report = load(place, **asked, **options)
    except Exception as error:
        advice = _advice(options, error, "give a complete copy, of a kind that transformers loads here")
        what = f"no causal language model could be loaded from {_shown(place, options)}"
        raise ModelError(f"{what}: {_reason(error)}; {advice}") from error
    check_taken(_shown(place, options), module, report["unexpected_keys"])
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            first = min(key if isinstance(key, str) else f"{key[0]} of shape {key[1:]}" for key in report[kind])
            raise ModelError(
                f"the weights of {_shown(place, options)} do not fit its configuration: {len(report[kind])} "
                f"{kind.replace('_', ' ')}, the first is {first}; they would have been drawn at random: "
                "get a complete copy of the model"
            )
    return module


def _check(model: Model, place: str) -> None:
    """Refuse weights that are no numbers, and a vocabulary that is not the tokenizer's."""
    numbers = {id(p) for p in floating(model.module)}
    for (name, x), (_, _, held) in zip(weights_of(model.module).items(), model._hashed[0], strict=True):
        if (id(x) in numbers or not isinstance(x, nn.Parameter)) and not math.isfinite(held):
            raise ModelError(f"the weights hold NaN or infinity: {name!r} of {place!r}; get a sound copy of the model")
    rows = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    highest = largest_token(model.tokenizer, added=False)
    if highest >= rows:  # further tokens past the rows, such as one for padding, are an error only where they occur
        raise ModelError(
            f"the vocabulary does not fit the tokenizer: the model embeds {rows:,} tokens, "
            f"the tokenizer numbers up to {highest:,}; use the tokenizer that the model was trained with"
        )


def _shown(place: str, options: dict[str, Any]) -> str:
    return repr(str(Path(place, options["gguf_file"])) if options else place)


def _reason(error: Exception) -> str:
    """What another library says, as part of one sentence."""
    text = " ".join(str(error).split()).rstrip(".;") if isinstance(error, OSError | ValueError | ImportError) else ""
    text = text or f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= MOST else text[:MOST] + " ..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars and advice of ``transformers`` while it loads; what matters is checked afterwards."""
    from transformers.utils import logging

    level, show = logging.get_verbosity(), logging.enable_progress_bar if logging.is_progress_bar_enabled() else str
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        show()
