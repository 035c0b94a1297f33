"""A batch says which sequences go through the model together, and how they are padded.

Axes: N sequences (rows), T positions.  A corpus, whatever it holds, offers the same few things, and everything after it
asks for nothing else: ``len``, ``lengths_N``, ``plan``, ``batch``, ``sample``, ``fingerprint``.
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upriver.errors import ModelError
from upriver.runtime.device import in_parts
from upriver.tensors import sent


class Places(NamedTuple):
    """Where a mask of a batch is true, found before the batch goes to its device, which would have to be waited for."""

    mask_NT: Tensor
    at_M: Tensor  # int64: indices into its N T positions, row by row
    counts_N: list[int]  # how many each row has
    first: int  # column that was looked at
    version: int  # of the mask, which changes when it is written over

    @classmethod
    def of(cls, mask_NT: Tensor, first: int = 0) -> "Places":
        """Where a mask is true from the column ``first`` on."""
        from_first_NT = (
            mask_NT if not first else torch.cat([torch.zeros_like(mask_NT[:, :first]), mask_NT[:, first:]], 1)
        )
        return cls(
            mask_NT, from_first_NT.flatten().nonzero()[:, 0], from_first_NT.sum(1).tolist(), first, _version(mask_NT)
        )

    def are_of(self, mask_NT: Tensor, first: int) -> bool:
        return self.mask_NT is mask_NT and (self.first, self.version) == (first, _version(mask_NT))

    def of_calls(self, calls: int) -> tuple[Tensor, list[int]]:
        """Indices and counts for a layer that was called so many times, its calls side by side."""
        if calls == 1:
            return self.at_M, self.counts_N
        T = self.mask_NT.shape[1]
        first_M = self.at_M + self.at_M // T * (calls - 1) * T
        at_CM = first_M + T * torch.arange(calls, device=first_M.device)[:, None]
        return at_CM.flatten().sort().values, [calls * count for count in self.counts_N]


@dataclass(frozen=True)
class Batch:
    """A batch holds sequences that go through the model together, padded on the right with token 0.

    A language model's ``inputs`` are ``tokens`` (int64 ``[N, T]``) and ``loss`` (bool ``[N, T]``): ``loss[n, t]`` says
    that token ``t`` is predicted with loss, from the tokens before it; it is never true at position 0.
    """

    rows_N: np.ndarray  # int64: index of each sequence in its corpus (or of each row of the queries)
    keys_N: np.ndarray  # uint64: counter key of each sequence, for sampled labels
    inputs: dict[str, Tensor]
    real_NT: Tensor | None  # bool: True at real tokens; None: every position is real and T = 1
    weight_N: Tensor | None = None  # queries only: +1 completion, -1 contrast
    query_N: np.ndarray | None = None  # queries only: int64 index of the query that each row belongs to
    masks: tuple[Tensor, ...] = ()  # bool [N, T]: real positions, for layers that see T; each of another T

    known: tuple[Places, ...] = ()  # of the masks of a batch that was moved

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch with its tensors on ``device``."""
        device = torch.device(device)
        inputs = {name: sent(x, device) for name, x in self.inputs.items()}
        real_NT, weight_N = (None if x is None else sent(x, device) for x in (self.real_NT, self.weight_N))
        known = []
        if self.real_NT is not None and real_NT is not None:
            known = [(self._places(self.real_NT), real_NT)]
            if is_mask(self.inputs.get("loss"), self.real_NT):
                known.append((self.predicted(), inputs["loss"]))
        masks = tuple(sent(x, device) for x in self.masks)
        known += zip(map(self._places, self.masks), masks, strict=True)
        moved = tuple(
            x._replace(mask_NT=mask_NT, at_M=sent(x.at_M, device), version=_version(mask_NT)) for x, mask_NT in known
        )
        return dataclasses.replace(self, inputs=inputs, real_NT=real_NT, weight_N=weight_N, masks=masks, known=moved)

    def row(self, n: int) -> "Batch":
        """One of its rows as a batch of its own, padded as it was."""
        at = slice(n, n + 1)
        inputs = {name: x[at] for name, x in self.inputs.items()}
        real_NT, weight_N = (None if x is None else x[at] for x in (self.real_NT, self.weight_N))
        query_N = None if self.query_N is None else self.query_N[at]
        masks = tuple(x[at] for x in self.masks)
        return Batch(self.rows_N[at], self.keys_N[at], inputs, real_NT, weight_N, query_N, masks)

    @property
    def device(self) -> torch.device:
        """Where its inputs are."""
        return next(x.device for x in self.inputs.values())

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that work of ``stream`` uses the memory of the batch, which another stream's copies filled."""
        for x in (
            *self.inputs.values(),
            *self.masks,
            self.real_NT,
            self.weight_N,
            *(known.at_M for known in self.known),
        ):
            if x is not None:
                x.record_stream(stream)

    def predicted(self) -> Places:
        """Where tokens are predicted with loss."""
        return self._places(self.inputs["loss"], 1)

    def real(self, x_NTI: Tensor, layer: str, at_NT: Tensor | None = None) -> tuple[Tensor | None, list[int]]:
        """Which of the ``N T`` rows that a layer saw are real, int64 ``[M]``, or None for all; and how many each sequence has.

        Args:
            at_NT: of an expert, the position of each row, or -1 where there is none.

        Raises:
            ModelError: sequences are padded, and the layer saw something else than their positions.
        """
        mask_NT, seen = self._mask(x_NTI.shape[1]), x_NTI.shape[1]
        if at_NT is not None:
            there_NT = at_NT >= 0
            if mask_NT is not None and mask_NT.shape[1] > 1:
                there_NT &= mask_NT.gather(1, at_NT.clamp(min=0))
            return there_NT.flatten().nonzero()[:, 0], there_NT.sum(1).tolist()
        places = None if mask_NT is None else self._places(mask_NT)
        if places is None or len(places.at_M) == places.mask_NT.numel():
            return None, [seen] * len(x_NTI)
        calls, rest = divmod(seen, T := places.mask_NT.shape[1])
        if rest or (calls > 1 and len(self.masks) > 1):  # of which mask is not known
            raise ModelError(
                f"layer {layer!r} cannot be tracked where sequences are padded: it sees {seen} rows of a sequence of {T} "
                "positions, of which it is not known what is padding; leave it out by giving globs to --layers, or give "
                "sequences of one length"
            )
        return places.of_calls(calls)

    def _mask(self, seen: int) -> Tensor | None:
        """The mask of a layer that sees so many positions; None: all are real, as where it sees an example as a whole."""
        if not self.masks:
            return self.real_NT
        return None if seen == 1 else next((x for x in self.masks if x.shape[1] == seen), self.masks[0])

    def _places(self, mask_NT: Tensor, first: int = 0) -> Places:
        """Known ones are of this very mask: who replaces an input of a batch, or writes it over, is not given the old ones."""
        return next((x for x in self.known if x.are_of(mask_NT, first)), None) or Places.of(mask_NT, first)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def is_mask(x: Tensor | None, real_NT: Tensor) -> bool:
    return x is not None and x.dtype == torch.bool and x.shape == real_NT.shape


def pad(rows: np.ndarray, keys_N: np.ndarray, tokens: Sequence[np.ndarray], loss: Sequence[np.ndarray]) -> Batch:
    """Make one batch of a language model from the tokens and loss masks of its sequences."""
    lengths = np.array([len(t) for t in tokens])
    real_NT = np.arange(lengths.max()) < lengths[:, None]
    tokens_NT, loss_NT = np.zeros(real_NT.shape, np.int64), np.zeros(real_NT.shape, bool)
    tokens_NT[real_NT], loss_NT[real_NT] = np.concatenate(tokens), np.concatenate(loss)
    loss_NT[:, 0] = False
    inputs = {"tokens": torch.from_numpy(tokens_NT), "loss": torch.from_numpy(loss_NT)}
    return Batch(np.asarray(rows, np.int64), np.asarray(keys_N), inputs, torch.from_numpy(real_NT))


def plan(lengths_N: np.ndarray, batch_tokens: int, rows: np.ndarray | None = None) -> list[np.ndarray]:
    """Cut ``rows`` (default: all) into batches of at most ``batch_tokens`` positions, padding counted.

    Longest first, so that a batch that does not fit in memory fails at once; rows of equal length keep their order, so
    the batches depend on the lengths and the rows alone (and are cut in halves once the memory of a device has run out in a
    pass: :func:`upriver.runtime.device.within_memory`).  A sequence longer than the budget is a batch of its own.
    """
    rows = np.arange(len(lengths_N)) if rows is None else np.asarray(rows, np.int64)
    rows = rows[np.argsort(-np.asarray(lengths_N)[rows].astype(np.int64), kind="stable")]
    batches, start = [], 0
    while start < len(rows):
        size = max(1, batch_tokens // int(lengths_N[rows[start]]))
        batches += in_parts(rows[start : start + size])
        start += size
    return batches


def splitmix64(x_N: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers so that every bit of the result depends on every bit of the argument (Steele et al. 2014)."""
    x = x_N + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def content_hash(content: bytes) -> int:
    """Hash the content of a sequence to 64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def sequence_hash(tokens_T: np.ndarray, loss_T: np.ndarray) -> int:
    """Hash the tokens of a sequence and which of them are predicted with loss; the first never is."""
    return content_hash(np.asarray(tokens_T, "<u4").tobytes() + np.asarray(loss_T[1:], bool).tobytes())


def sequence_keys(hashes_N: np.ndarray) -> np.ndarray:
    """Give each sequence its counter key: the hash of its content mixed with how many equal sequences came before it.

    Keys are distinct and do not depend on where in the corpus a sequence stands.
    """
    occurrence_N = pd.Series(hashes_N).groupby(hashes_N).cumcount().to_numpy().astype(np.uint64)
    return splitmix64(hashes_N ^ splitmix64(occurrence_N))


class Sequences(ABC):
    """Every corpus offers this, and nothing else, to the passes that stream over it.

    Attributes:
        lengths_N: tokens of each sequence.
        keys_N: uint64, its counter key: what it holds, whatever its place.
        fingerprint: a hash of all that it holds.
    """

    lengths_N: np.ndarray
    keys_N: np.ndarray
    fingerprint: str

    @abstractmethod
    def batch(self, rows: np.ndarray) -> Batch:
        """Return the sequences ``rows`` as one batch."""

    def __len__(self) -> int:
        return len(self.lengths_N)

    def plan(self, batch_tokens: int, rows: np.ndarray | None = None) -> list[np.ndarray]:
        """Cut rows into batches of at most ``batch_tokens`` positions, padding counted, longest first; see :func:`plan`."""
        return plan(self.lengths_N, batch_tokens, rows)

    def sample(self, max_tokens: int, seed: int) -> np.ndarray:
        """Select sequences at random, by ``seed``, of at most ``max_tokens`` tokens but at least one; return their sorted rows.

        The draw depends on each sequence's key, not on its place, so reordering a corpus selects the same sequences.
        """
        seeds = splitmix64(np.array([seed % 2**64], np.uint64))
        order = np.argsort(splitmix64(np.asarray(self.keys_N) ^ seeds), kind="stable")
        total = np.cumsum(np.asarray(self.lengths_N)[order], dtype=np.int64)
        return np.sort(order[: max(1, np.searchsorted(total, max_tokens, side="right"))])
