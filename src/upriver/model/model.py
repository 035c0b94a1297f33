"""A model: a module, its task and its tokenizer, in one place in memory, in the type that it computes in."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from upriver.errors import ConfigError, ModelError
from upriver.model.adapter import trained, unwrapped
from upriver.model.capture import frozen
from upriver.model.fingerprint import module_form, task_form, tensor_hash
from upriver.model.losses import LanguageModel, Task
from upriver.model.packed import any_packed, check_numbers, floating, parameter_sizes
from upriver.model.text_part import positions, text_config
from upriver.model.weights import Checkpoint, converted, in_dtype, in_place, weights_of
from upriver.runtime import dist
from upriver.runtime.artifact import digest
from upriver.runtime.config import MIXED, default_how, weights_in

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
CHECKED = 1 << 18  # numbers of a weight that are summed at once, in float64
SWITCHING = re.compile("longrope|dynamic")  # rotary frequencies that follow the length of what is given together
NOT_HASHED: Any = ((), ())

_CAUSAL: WeakSet[nn.Module] = WeakSet()  # found to be so, in this process


@dataclass
class Model:
    """A module, what it is for, and (for a language model) its tokenizer.

    Any ``torch.nn.Module`` will do: ``Model(module, task=Classification())``.  Of a ``PeftModel`` the base is kept, whose layers
    hold the adapters.
    """

    module: nn.Module
    tokenizer: Any = None
    task: Task = field(default_factory=LanguageModel)
    name: str = "module"
    info: dict[str, Any] = field(default_factory=dict)  # attention kernel, vocabulary, ... as loaded
    handed: torch.dtype | None = None  # dtype of what passes hand on of the layers; None: that of the weights
    source: Checkpoint | None = field(default=None, repr=False, compare=False)  # what it was loaded from
    _hashed: tuple[list[tuple], list[str]] = field(default=NOT_HASHED, repr=False, compare=False)  # checksums, hashes

    def __post_init__(self) -> None:
        self.module = unwrapped(self.module)
        check_numbers(self.module)

    @property
    def default_layers(self) -> str:
        """The layers that are tracked where none are named: what an adapter trained, else the MLP."""
        return "lora" if trained(self.module).layers else "mlp"

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

    def settled(self, opts: Any) -> Any:
        """Options with the compute type and the tokens of a batch that suit the device, where they name none."""
        own = str(self.dtype).removeprefix("torch.")
        dtype = opts.dtype or (own if any_packed(self.module) else None)
        how = default_how(self.device.type != "cpu", dtype, opts.batch_tokens, own)
        return opts.model_copy(update=how | {"layers": opts.layers or self.default_layers})

    @property
    def attention(self) -> str:
        """The kernel of the module's attention as it is set now."""
        config = getattr(self.module, "config", None)
        return getattr(config, "_attn_implementation", None) or self.info.get("attention") or "the model's own"

    @property
    def positions(self) -> int | None:
        """How many tokens the module takes; None where nothing says."""
        return positions(self.module) or self.info.get("positions")

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
        state = weights_of(self.module)
        if any(map(dist.sharded, state.values())):
            raise ModelError(
                "the model's weights are divided over processes, as by FSDP; give every process the whole model: "
                "fit and trace divide the corpus among them"
            )
        self._look()
        form = [digest(module_form(self.module)), *task_form(self.task)]
        return digest([*form, *zip(state, self._hashes(), strict=True)])

    def _hashes(self) -> list[str]:
        """Of every weight as it was looked at last; of one that was rounded when it was loaded, as the files have it."""
        sums, hashes = self._hashed
        if not hashes:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                self._hashed = sums, list(pool.map(tensor_hash, weights_of(self.module).values()))
        return self._hashed[1]

    def _look(self) -> None:
        """Notice where the weights are no longer what they were when they were looked at last: training changes them."""
        sums = checksums(self.module)
        if self._hashed[0] != sums:
            self.source, self._hashed = None, (sums, [])

    def more_in(self, dtype: str) -> int:
        """Bytes that computing in another type takes beside what the model takes now."""
        wanted, there = dtype_named(weights_in(dtype)), sum(p.nbytes for p in self.module.parameters())
        if in_dtype(self.module, wanted):
            return 0
        self._look()
        return max(0, wanted.itemsize * self.n_parameters - (there if self.source else 0))

    @contextlib.contextmanager
    def computing_in(self, dtype: str, handed: torch.dtype | None = None) -> Iterator["Model"]:
        """This model with its weights in ``dtype`` as long as the block lasts.

        A model that was loaded from files is converted in place and back, one weight at a time; of any other there is a copy.

        Args:
            dtype: ``mixed`` is float32, with what the layers saw handed on in bfloat16.
            handed: the type of what passes hand on of the layers; None: that of the weights.
        """
        wanted, handed = dtype_named(weights_in(dtype)), torch.bfloat16 if dtype == MIXED else handed
        given: dict[str, Any] = {"handed": handed}
        other = not in_dtype(self.module, wanted)
        with self.task_kept(), contextlib.ExitStack() as inside:
            if other:
                self._look()
            if other and self.source is not None:
                hashes = self._hashes()
                inside.enter_context(in_place(self.module, wanted, self.source, hashes))
                given["_hashed"] = checksums(self.module), hashes
            elif other:
                given |= {"module": converted(self.module, wanted), "source": None, "_hashed": NOT_HASHED}
                if self.module in _CAUSAL:
                    _CAUSAL.add(given["module"])
            yield dataclasses.replace(self, **given) if other or handed != self.handed else self

    @contextlib.contextmanager
    def task_kept(self) -> Iterator[None]:
        """What the task notes while the block lasts is forgotten afterwards: it would make another task of it."""
        noted = dict(vars(self.task))
        try:
            yield
        finally:
            vars(self.task).clear()
            vars(self.task).update(noted)


def check_model(model: Any) -> None:
    """Refuse what is no :class:`Model`."""
    if not isinstance(model, Model):
        raise ModelError(
            f"not a model of ours: got {type(model).__name__}; give up.Model(module, task=up.Classification()), "
            "up.Model(module, tokenizer), or up.load_model(PATH)"
        )


def dtype_named(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype: got {name!r}; one of {', '.join(DTYPES)}")
    return DTYPES[name]


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
    rows, T = embeddings.weight.shape[0], min(T, positions(module) or T)
    tokens = torch.arange(T, device=embeddings.weight.device)[None] % rows
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % rows
    with frozen(module), torch.no_grad():
        logits, others = (module(input_ids=t, use_cache=False).logits for t in (tokens, other))
    if logits.shape[:2] != tokens.shape:
        raise ModelError(
            f"the model does not predict the token after each: got logits of shape {tuple(logits.shape)} for {T} tokens; give a "
            "causal language model"
        )
    first, second = logits[0, :-1].float(), others[0, :-1].float()
    if not torch.isfinite(first).all():
        raise ModelError("the model's predictions hold NaN or infinity; try --dtype float32")
    tolerance = 1e-2 if embeddings.weight.dtype == torch.bfloat16 else 1e-4  # 51 causal architectures stay below 1e-6
    if T > 1 and (first - second).abs().max() > tolerance * first.abs().max():
        raise ModelError(
            "the model is not causal: a later token changes the prediction before it; give a causal language model"
        )
    _CAUSAL.add(module)


def checksums(module: nn.Module) -> list[tuple]:
    """What differs when a weight does; NaN or infinity where one of its numbers is."""
    return list(map(_checksum, weights_of(module).values()))


def _checksum(x: Tensor) -> tuple[torch.dtype, torch.Size, float]:
    """What differs when an entry does or changes its place; cheap beside a hash."""
    places = _places(x.device)
    sums = [part.double() @ places[: len(part)] for part in x.detach().reshape(-1).split(CHECKED)]
    return x.dtype, x.shape, float(torch.stack(sums) @ places[: len(sums)])


@cache
def _places(device: torch.device) -> Tensor:
    """A weight for each place, all of them different."""
    return torch.arange(CHECKED, dtype=torch.float64, device=device).cos()
