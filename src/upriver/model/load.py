"""Load a causal language model of ``transformers`` with its tokenizer, and refuse what would give wrong numbers."""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from upriver.errors import ConfigError, ModelError
from upriver.model.capture import frozen
from upriver.model.fingerprint import module_form, task_form, tensor_hash
from upriver.model.losses import LanguageModel, Task
from upriver.model.packed import floating, packed_checkpoint, parameter_sizes, rest_in, scales
from upriver.model.weights import converted, in_dtype, leave_files
from upriver.runtime import dist
from upriver.runtime.artifact import digest
from upriver.runtime.config import MIXED, weights_in
from upriver.text.tokenise import largest_token, require_offsets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

CHECKED = 1 << 18  # numbers of a weight that are summed at once, in float64
PLACES = "give a folder written by save_pretrained, a .gguf file"
MOST = 240  # characters of what another library says, in a sentence
SWITCHING = re.compile("longrope|dynamic")  # rotary frequencies that follow the length of what is given together

_CAUSAL: WeakSet[nn.Module] = WeakSet()  # found to be so, in this process


@dataclass
class Model:
    """A module, what it is for, and (for a language model) its tokenizer.

    Any ``torch.nn.Module`` will do: ``Model(module, task=Classification())``.
    """

    module: nn.Module
    tokenizer: Any = None
    task: Task = field(default_factory=LanguageModel)
    name: str = "module"
    info: dict[str, Any] = field(default_factory=dict)  # attention kernel, vocabulary, ... as loaded
    handed: torch.dtype | None = None  # dtype of what passes hand on of the layers; None: that of the weights
    _hashed: tuple[list[tuple], list[str]] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(floating(self.module)).dtype

    @property
    def n_parameters(self) -> int:
        return sum(parameter_sizes(self.module).values())

    @property
    def like(self) -> Tensor:
        """An empty tensor in the device and dtype of what passes give of the layers."""
        return torch.empty(0, dtype=self.handed or self.dtype, device=self.device)

    @property
    def attention(self) -> str:
        """The kernel of the module's attention as it is set now."""
        config = getattr(self.module, "config", None)
        return getattr(config, "_attn_implementation", None) or self.info.get("attention") or "the model's own"

    @property
    def positions(self) -> int | None:
        """How many tokens the module takes; None where nothing says."""
        config = text_config(self.module)
        return getattr(config, "max_position_embeddings", None) or self.info.get("positions")

    @property
    def rotary_limit(self) -> int | None:
        """Tokens beyond which rotary frequencies depend on the longest sequence of a batch, as in Phi-3-128k; None: never."""
        config = text_config(self.module)
        told = (getattr(config, name, None) for name in ("rope_parameters", "rope_scaling"))
        given = next((x for x in told if x and isinstance(x, dict)), {})
        own, limits = getattr(config, "original_max_position_embeddings", None), []
        for rope in (given, *given.values()):  # one for all layers, or one for each kind
            if isinstance(rope, dict) and SWITCHING.search(str(rope.get("rope_type", rope.get("type")))):
                limits.append(rope.get("original_max_position_embeddings", own))
        return min(filter(None, limits), default=None)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence whose scores do not depend on its batch; None: any."""
        return min(filter(None, (self.positions, self.rotary_limit)), default=None)

    @property
    def fingerprint(self) -> str:
        """A hash of every weight and buffer with its name, of the architecture, and of a task's loss.

        Raises:
            ModelError: the weights are divided over processes.
        """
        lasting = self.module.state_dict().keys()  # without what a forward pass may note for itself
        state = dict(self.module.named_parameters()) | {n: x for n, x in self.module.named_buffers() if n in lasting}
        state |= scales(self.module)
        if any(map(dist.sharded, state.values())):
            raise ModelError(
                "the model's weights are divided over processes, as by FSDP; give every process the whole model: "
                "fit and trace divide the corpus among them"
            )
        sums = list(map(_checksum, state.values()))  # training on changes them
        if self._hashed is None or self._hashed[0] != sums:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                self._hashed = sums, list(pool.map(tensor_hash, state.values()))
        form = [digest(module_form(self.module)), *task_form(self.task)]
        return digest([*form, *zip(state, self._hashed[1], strict=True)])

    @contextlib.contextmanager
    def computing_in(self, dtype: str) -> Iterator["Model"]:
        """This model with its weights in ``dtype``; a copy that lives as long as the block where that differs.

        ``mixed``: the model in float32, and what its layers saw handed on in bfloat16.
        """
        wanted, handed = dtype_named(weights_in(dtype)), torch.bfloat16 if dtype == MIXED else None
        module = self.module if in_dtype(self.module, wanted) else converted(self.module, wanted)
        if self.module in _CAUSAL:
            _CAUSAL.add(module)
        same, noted = module is self.module and handed == self.handed, dict(vars(self.task))
        try:
            yield self if same else dataclasses.replace(self, module=module, handed=handed)
        finally:  # what a task notes on the way would make another task of it
            vars(self.task).clear()
            vars(self.task).update(noted)


def dtype_named(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype: got {name!r}; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU when there is one.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that cannot compute, such as meta, fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"no such device here: got {name!r}; use auto, cpu, cuda or cuda:N") from error
    return device


def load_model(path: str | Path, dtype: str = "float32", device: str = "auto", attention: str = "sdpa") -> Model:
    """A causal language model and its tokenizer, from a folder, a GGUF file, or a name on the Hugging Face hub.

    Args:
        path: a folder that ``save_pretrained`` wrote, a ``.gguf`` file or a folder with one, or a hub name.
        dtype: of the weights in memory: float32 or bfloat16 (float64 for tests).
        device: ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        attention: the kernel asked for; ``Model.attention`` is what the model really uses.

    Raises:
        ConfigError: no such device here, or no such dtype.
        ModelError: no model there, weights missing or NaN, no fast tokenizer, or a vocabulary that does not fit.
    """
    on, wanted = pick_device(device), dtype_named(dtype)
    place, options = _locate(str(path))
    there = {"device_map": {"": on}} if not options and packed_checkpoint(place) else {}  # where weights are packed
    with _quiet():
        tokenizer = _load_tokenizer(place, options)
        module = _load_module(place, options, wanted, attention, there)
    module = (rest_in(module, wanted) if there else module.to(on)).eval()
    leave_files(module)
    _check(module, tokenizer, str(path))
    check_causal(module)
    model = Model(module, tokenizer, name=str(path))
    model.info |= {
        "attention": model.attention,
        "vocabulary": int(module.get_input_embeddings().weight.shape[0]),
        "positions": model.positions,
        "architecture": type(module).__name__,
    }
    return model


def _locate(path: str) -> tuple[str, dict[str, Any]]:
    """Where ``from_pretrained`` shall look, and the GGUF file's name when the weights are in one."""
    place = Path(path)
    try:
        if place.suffix == ".gguf" and place.is_file():
            return str(place.parent), {"gguf_file": place.name}
        there, folder, plain = place.exists(), place.is_dir(), (place / "config.json").exists()
        ggufs = sorted(place.glob("*.gguf")) if folder and not plain else []
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

    advice = "put the tokenizer.json that the model was trained with beside it"
    failed = f"no tokenizer could be loaded from {_shown(place, options)}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here, and a wrong file any of them
        _check_there(place, error)
        raise ModelError(f"{failed}: {_reason(error)}; {_advice(options, error, advice)}") from error
    require_offsets(tokenizer)
    added = {str(x) for x in tokenizer.added_tokens_decoder.values()}
    if tokenizer.get_vocab().keys() <= added | set(tokenizer.all_special_tokens):  # made up from the model's type alone
        raise ModelError(f"{failed}: its vocabulary would be the {len(tokenizer)} special tokens alone; {advice}")
    return tokenizer


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
    asked |= there
    try:
        try:
            kernel = {"attn_implementation": attention}
            module, report = load(place, **asked, **kernel, **options)
        except ValueError as error:
            if "attn" not in str(error) and "attention" not in str(error):
                raise
            module, report = load(place, **asked, **options)
    except Exception as error:
        advice = _advice(options, error, "give a sound and complete copy of a causal language model")
        what = f"no causal language model could be loaded from {_shown(place, options)}"
        raise ModelError(f"{what}: {_reason(error)}; {advice}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            first = min(key if isinstance(key, str) else f"{key[0]} of shape {key[1:]}" for key in report[kind])
            raise ModelError(
                f"the weights of {_shown(place, options)} do not fit its configuration: {len(report[kind])} "
                f"{kind.replace('_', ' ')}, the first is {first}; they would have been drawn at random: "
                "get a complete copy of the model"
            )
    return module


def _check(module: Any, tokenizer: Any, place: str) -> None:
    """Refuse weights that are no numbers, and a vocabulary that is not the tokenizer's."""
    numbers = set(floating(module))
    for name, p in [*module.named_parameters(), *scales(module).items()]:
        if (p in numbers or not isinstance(p, nn.Parameter)) and not torch.isfinite(p).all():
            raise ModelError(f"the weights hold NaN or infinity: {name!r} of {place!r}; get a sound copy of the model")
    rows, highest = module.get_input_embeddings().weight.shape[0], largest_token(tokenizer)
    if highest >= rows:
        raise ModelError(
            f"the vocabulary does not fit the tokenizer: the model embeds {rows:,} tokens, "
            f"the tokenizer numbers up to {highest:,}; use the tokenizer that the model was trained with"
        )


def check_causal(module: Any, T: int = 8) -> None:
    """Change the last token: in a causal model nothing before it may move, and padding on the right is then harmless.

    A module is looked at once; one that does not show its input embeddings is taken at its word.

    Raises:
        ModelError: it is not causal, or predicts NaN or infinity.
    """
    find = getattr(module, "get_input_embeddings", None)
    embeddings = None if find is None or module in _CAUSAL else find()
    if embeddings is None:
        return
    rows, T = embeddings.weight.shape[0], min(T, getattr(text_config(module), "max_position_embeddings", None) or T)
    tokens = torch.arange(T, device=embeddings.weight.device)[None] % rows
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % rows
    with frozen(module), torch.no_grad():
        first, second = (module(input_ids=t, use_cache=False).logits[0, :-1].float() for t in (tokens, other))
    if not torch.isfinite(first).all():
        raise ModelError("the model's predictions hold NaN or infinity; try --dtype float32")
    tolerance = 1e-2 if embeddings.weight.dtype == torch.bfloat16 else 1e-4  # 51 causal architectures stay below 1e-6
    if T > 1 and (first - second).abs().max() > tolerance * first.abs().max():
        raise ModelError(
            "the model is not causal: a later token changes the prediction before it; give a causal language model"
        )
    _CAUSAL.add(module)


def text_config(module: nn.Module) -> Any:
    """The configuration of a module, or of its part that reads text; whatever else a module calls ``config``; or None."""
    config = getattr(module, "config", None)
    find = getattr(config, "get_text_config", None)
    return config if find is None else find()


def _checksum(x: Tensor) -> tuple[torch.dtype, torch.Size, float]:
    """What differs when an entry does or changes its place; cheap beside a hash."""
    places = _places(x.device)
    sums = [part.double() @ places[: len(part)] for part in x.detach().reshape(-1).split(CHECKED)]
    return x.dtype, x.shape, float(torch.stack(sums) @ places[: len(sums)])


@cache
def _places(device: torch.device) -> Tensor:
    """A weight for each place, all of them different."""
    return torch.arange(CHECKED, dtype=torch.float64, device=device).cos()


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
