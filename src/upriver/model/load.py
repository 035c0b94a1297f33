"""Load a causal language model of ``transformers`` with its tokenizer, and refuse what would give wrong numbers."""

import contextlib
import dataclasses
import hashlib
import inspect
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upriver.errors import ConfigError, ModelError
from upriver.model.convert import converted, in_dtype
from upriver.model.losses import LanguageModel, Task
from upriver.runtime import dist
from upriver.runtime.config import MIXED, weights_in
from upriver.runtime.store import digest
from upriver.text.encode import largest_token, require_offsets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function that a module shows


@dataclass
class Model:
    """A module, what it is for, and (for a language model) its tokenizer.

    Any ``torch.nn.Module`` will do: ``Model(module, task=Classification())``.
    """

    module: nn.Module
    tokenizer: Any = None
    task: Task = field(default_factory=LanguageModel)
    name: str = "module"
    info: dict[str, Any] = field(default_factory=dict)  # attention kernel, vocabulary, ...
    handed: torch.dtype | None = None  # dtype of what passes hand on of the layers; None: that of the weights
    _hashed: tuple[list[float], list[str]] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def like(self) -> Tensor:
        """An empty tensor in the device and dtype of what passes give of the layers."""
        return torch.empty(0, dtype=self.handed or self.dtype, device=self.device)

    @property
    def fingerprint(self) -> str:
        """A hash of every weight and buffer with its name, of the architecture, and of a task's loss.

        Raises:
            ModelError: the weights are divided over processes.
        """
        lasting = self.module.state_dict().keys()  # without what a forward pass may note for itself
        state = dict(self.module.named_parameters()) | {n: x for n, x in self.module.named_buffers() if n in lasting}
        if any(map(dist.sharded, state.values())):
            raise ModelError(
                "the model's weights are divided over processes, as by FSDP; give every process the whole model: "
                "fit and trace divide the corpus among them"
            )
        weights = [float(x.detach().sum(dtype=torch.float64)) for x in state.values()]  # training on changes them
        if self._hashed is None or self._hashed[0] != weights:
            with ThreadPoolExecutor() as pool:
                self._hashed = weights, list(pool.map(_tensor_hash, state.values()))
        return digest([*self._described(), *zip(state, self._hashed[1], strict=True)])

    def _described(self) -> list[Any]:
        """The architecture, without the version of transformers, and what makes the loss of a task: all but its measurement."""
        config = getattr(self.module, "config", None)
        if config is None:
            form: Any = ADDRESS.sub("", repr(self.module))
        else:
            form = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
        if type(self.task) is LanguageModel:
            return [digest(form)]
        methods = {
            n: f.__qualname__ for n, f in inspect.getmembers(type(self.task), inspect.isfunction) if n != "measurement"
        }
        public = {n: value for n, value in vars(self.task).items() if not n.startswith("_")}
        settings = {
            n: _tensor_hash(x) if isinstance(x, Tensor) else ADDRESS.sub("", repr(x)) for n, x in public.items()
        }
        return [digest(form), methods, settings]

    @contextlib.contextmanager
    def computing_in(self, dtype: str) -> Iterator["Model"]:
        """This model with its weights in ``dtype``; a copy that lives as long as the block where that differs.

        ``mixed``: the model in float32, and what its layers saw handed on in bfloat16.
        """
        wanted, handed = dtype_named(weights_in(dtype)), torch.bfloat16 if dtype == MIXED else None
        module = self.module if in_dtype(self.module, wanted) else converted(self.module, wanted)
        same = module is self.module and handed == self.handed
        yield self if same else dataclasses.replace(self, module=module, handed=handed)


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
        attention: the kernel asked for; what the model really uses is recorded in ``info``.

    Raises:
        ConfigError: no such device here, or no such dtype.
        ModelError: no model there, weights missing or NaN, no fast tokenizer, or a vocabulary that does not fit.
    """
    on, wanted = pick_device(device), dtype_named(dtype)
    place, options = _locate(str(path))
    with _quiet():
        tokenizer = _load_tokenizer(place, options)
        module = _load_module(place, options, wanted, attention)
    module = module.to(on).eval()
    _check_weights(module, str(path))
    _check_vocabulary(module, tokenizer)
    _check_causal(module)
    config = module.config.get_text_config()
    info = {
        "attention": getattr(module.config, "_attn_implementation", None) or "the model's own",
        "vocabulary": int(module.get_input_embeddings().weight.shape[0]),
        "positions": getattr(config, "max_position_embeddings", None),
        "architecture": type(module).__name__,
    }
    return Model(module, tokenizer, name=str(path), info=info)


def _locate(path: str) -> tuple[str, dict[str, Any]]:
    """Where ``from_pretrained`` shall look, and the GGUF file's name when the weights are in one."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        return str(place.parent), {"gguf_file": place.name}
    if place.is_dir():
        ggufs = sorted(place.glob("*.gguf"))
        if (place / "config.json").exists():
            return path, {}
        if not ggufs:
            raise ModelError(
                f"no model in the folder: got {path!r} without a config.json or a .gguf file; "
                "give a folder written by save_pretrained"
            )
        if len(ggufs) > 1:
            raise ModelError(f"{path} holds {len(ggufs)} GGUF files; name one of them, such as {ggufs[0]}")
        return path, {"gguf_file": ggufs[0].name}
    if place.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"no model at {path!r}; give a folder written by save_pretrained, a .gguf file, or a hub name")
    return path, {}


def _load_tokenizer(place: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here, and a wrong file any of them
        raise ModelError(
            f"no tokenizer could be loaded from {_shown(place, options)}: {_reason(error)}; "
            "put the tokenizer.json that the model was trained with beside it"
        ) from error
    require_offsets(tokenizer)
    return tokenizer


def _load_module(place: str, options: dict[str, Any], dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    def load(**extra: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            **options, **extra,
        )  # fmt: skip

    try:
        try:
            module, report = load(attn_implementation=attention)
        except ValueError as error:
            if "attn" not in str(error) and "attention" not in str(error):
                raise
            module, report = load()
    except Exception as error:
        raise ModelError(
            f"no causal language model could be loaded from {_shown(place, options)}: {_reason(error)}; "
            "give a sound and complete copy of a causal language model"
        ) from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            first = min(key if isinstance(key, str) else f"{key[0]} of shape {key[1:]}" for key in report[kind])
            raise ModelError(
                f"the weights of {_shown(place, options)} do not fit its configuration: {len(report[kind])} "
                f"{kind.replace('_', ' ')}, the first is {first}; they would have been drawn at random: "
                "get a complete copy of the model"
            )
    return module


def _check_weights(module: nn.Module, place: str) -> None:
    for name, p in module.named_parameters():
        if not torch.isfinite(p).all():
            raise ModelError(f"the weights hold NaN or infinity: {name!r} of {place!r}; get a sound copy of the model")


def _check_vocabulary(module: Any, tokenizer: Any) -> None:
    rows, highest = module.get_input_embeddings().weight.shape[0], largest_token(tokenizer)
    if highest >= rows:
        raise ModelError(
            f"the vocabulary does not fit the tokenizer: the model embeds {rows:,} tokens, "
            f"the tokenizer numbers up to {highest:,}; use the tokenizer that the model was trained with"
        )


def _check_causal(module: Any, T: int = 8) -> None:
    """Change the last token: in a causal model nothing before it may move, and padding on the right is then harmless."""
    rows = module.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(T, device=module.get_input_embeddings().weight.device)[None] % rows
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % rows
    with torch.no_grad():
        first, second = (module(input_ids=t, use_cache=False).logits[0, :-1].float() for t in (tokens, other))
    if not torch.isfinite(first).all():
        raise ModelError("the model's predictions hold NaN or infinity; try --dtype float32")
    tolerance = 1e-2 if module.dtype == torch.bfloat16 else 1e-4  # 51 causal architectures stay below 1e-6
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise ModelError(
            "the model is not causal: a later token changes the prediction before it; give a causal language model"
        )


def _tensor_hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.blake2b(head + flat.numpy().tobytes(), digest_size=16).hexdigest()


def _shown(place: str, options: dict[str, Any]) -> str:
    return repr(str(Path(place, options["gguf_file"])) if options else place)


def _reason(error: Exception, most: int = 240) -> str:
    """What another library says, as part of one sentence."""
    text = " ".join(str(error).split()).rstrip(".;") if isinstance(error, OSError | ValueError | ImportError) else ""
    text = text or f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= most else text[:most] + " ..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars and advice of ``transformers`` while it loads; what matters is checked afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
