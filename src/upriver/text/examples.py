"""Examples: a corpus of independent rows of numbers, from whatever people hold them in.

Axes: N examples, T positions.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from upriver.errors import CorpusError
from upriver.text.batch import Batch, Sequences, content_hash, sequence_keys

# What rows of different length are filled up with, by what a column's name ends with: the names of `transformers`.
FILLS = {"labels": -100, "input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
TAKEN = "give a dictionary of tensors or arrays, a TensorDataset, a datasets.Dataset, a list of dictionaries or a DataLoader"


class Examples(Sequences):
    """Examples are a corpus of independent rows of numbers, for any task; a `Task` says what the names mean.

    Args:
        data: a dictionary of names with tensors, arrays or lists, one row per example; a ``TensorDataset`` of ``x`` and ``y``; a
            ``datasets.Dataset`` or a list of dictionaries, whose columns of numbers are taken and whose texts are not; or a
            ``DataLoader``, which is read once, in the order of its data set.
        keys: uint64 ``[N]``: what labels of the Fisher are drawn by; None: a hash of the content.

    Rows of different length are taken under the names that ``transformers`` gives tokens (``input_ids``, ``labels``, ..), and
    ``attention_mask`` then says which positions are real.

    Example:
        >>> len(Examples({"x": torch.zeros(5, 2), "y": torch.zeros(5)}))
        5

    Raises:
        CorpusError: no example; columns of different length; what is no number.
    """

    def __init__(self, data: Any, keys: np.ndarray | None = None):
        columns = {name: _column(name, x) for name, x in _columns(data).items()}
        if "input_ids" in columns and isinstance(columns["input_ids"], list) and "attention_mask" not in columns:
            columns["attention_mask"] = [np.ones(len(x), np.int32) for x in columns["input_ids"]]
        sizes = {name: len(x) for name, x in columns.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise CorpusError(f"examples need tensors of one and the same length, at least 1: got {sizes}")
        self.inputs = {name: _filled(name, x) if isinstance(x, list) else x for name, x in columns.items()}
        masks = [t for name, t in self.inputs.items() if name.endswith("attention_mask") and t.ndim == 2]
        real_N = sum((mask.sum(1).cpu().numpy() for mask in masks), np.zeros(next(iter(sizes.values())), np.int64))
        self.lengths_N = np.maximum(1, real_N).astype(np.int32)
        named = sorted(self.inputs.items())
        flat = [t.cpu().reshape(len(self), -1).view(torch.uint8).numpy() for _, t in named]
        content_NB = np.ascontiguousarray(np.concatenate(flat, axis=1))
        if keys is None:
            keys = sequence_keys(np.array([content_hash(row.tobytes()) for row in content_NB], np.uint64))
        self.keys_N = np.asarray(keys, np.uint64)
        if self.keys_N.shape != self.lengths_N.shape:
            raise CorpusError(f"one key per example is needed: got {self.keys_N.shape} keys, {len(self)} examples")
        form = repr([(name, str(t.dtype), tuple(t.shape)) for name, t in named])
        content = hashlib.blake2b(form.encode(), digest_size=12)
        content.update(content_NB.tobytes())
        content.update(self.keys_N.tobytes())
        self.fingerprint = content.hexdigest()

    def batch(self, rows: np.ndarray) -> Batch:
        rows = np.asarray(rows, np.int64)
        picked = {name: t[torch.from_numpy(rows).to(t.device)] for name, t in self.inputs.items()}
        return Batch(rows, self.keys_N[rows], picked, None)


def sequences(data: Any) -> Sequences:
    """What passes go over: a corpus or what offers the same as it is, and all else that :class:`Examples` takes as these."""
    return data if isinstance(data, Sequences) or hasattr(data, "lengths_N") else Examples(data)


def _columns(data: Any) -> dict[str, Any]:
    """Names with what stands under them, a row per example."""
    if isinstance(data, DataLoader):
        return _loaded(data)
    if isinstance(data, TensorDataset):
        return _named(data.tensors, "a TensorDataset")
    if isinstance(data, tuple):
        return _named(data, "a tuple")
    if hasattr(data, "column_names") and hasattr(data, "with_format"):  # of `datasets`
        if isinstance(data.column_names, dict):
            raise CorpusError(f"a data set has several splits: got {', '.join(data)}; give one, such as data['train']")
        plain = data.with_format(None)
        return _numbers({name: list(plain[name]) for name in plain.column_names})
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        names = list(data[0])
        for n, row in enumerate(data):
            if list(row) != names and set(row) != set(names):
                raise CorpusError(
                    f"examples differ in their fields: got {', '.join(row)} in number {n}, {', '.join(names)} in the first; "
                    "give each the same ones"
                )
        return _numbers({name: [row[name] for row in data] for name in names})
    if not isinstance(data, dict) or not data:
        raise CorpusError(
            f"not examples: got {type(data).__name__}{' without a column' if isinstance(data, dict) else ''}; {TAKEN}"
        )
    return data


def _named(tensors: Sequence[Any], what: str) -> dict[str, Any]:
    if len(tensors) != 2:
        raise CorpusError(
            f"{what} holds an 'x' and a 'y': got {len(tensors)} tensors; give a dictionary of names with tensors"
        )
    return {"x": tensors[0], "y": tensors[1]}


def _numbers(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns but those of texts, which data sets keep beside the numbers that were made of them."""
    kept = {
        name: x for name, x in columns.items() if not any(isinstance(v, str | bytes | dict) or v is None for v in x)
    }
    if not kept:
        raise CorpusError(
            f"no column of numbers: got {', '.join(columns)}; tokenise texts first, or read them with up.Corpus.of"
        )
    return kept


def _loaded(loader: DataLoader) -> dict[str, Any]:
    """The rows of a loader in the order of its data set: one that shuffles would give them other numbers each time."""
    if not isinstance(loader.dataset, IterableDataset):
        at_once = loader.batch_size or 1
        loader = DataLoader(loader.dataset, batch_size=at_once, collate_fn=loader.collate_fn)
    parts: dict[str, list[Any]] = {}
    for batch in loader:
        named = dict(batch) if hasattr(batch, "keys") else _named(batch, "a batch of the DataLoader")
        for name, x in named.items():
            parts.setdefault(name, []).append(x)
    return {name: _joined(x) for name, x in parts.items()}


def _joined(batches: list[Any]) -> Any:
    tensors = [torch.as_tensor(x) for x in batches]
    if len({x.shape[1:] for x in tensors}) == 1:
        return torch.cat(tensors)
    return [row for x in tensors for row in x]  # padded batch by batch


def _column(name: str, given: Any) -> Tensor | list[np.ndarray]:
    """A column as a tensor of its own, ``[N, ...]``; or as a list of rows where they differ in length."""
    if isinstance(given, Tensor):
        if given.layout != torch.strided or given.is_quantized or given.is_complex():
            raise CorpusError(
                f"the column {name!r} is not a plain tensor of numbers: got {given.dtype} in the layout {given.layout}; "
                "give real numbers, .to_dense() or .dequantize()"
            )
        return torch.empty(given.shape, dtype=given.dtype, device=given.device).copy_(given.detach())
    if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
        raise CorpusError(f"the column {name!r} holds no rows: got {type(given).__name__}; give a tensor or an array")
    if isinstance(given, np.ndarray) and given.dtype != object:
        return _tensor(name, given)
    rows = [x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x) for x in given]
    if len({x.shape for x in rows}) <= 1:
        return _tensor(name, np.array(rows))
    if any(x.ndim != 1 for x in rows) or not any(name.endswith(end) for end in FILLS):
        raise CorpusError(
            f"the rows of {name!r} differ in shape: got {sorted({x.shape for x in rows})[:3]}; give rows of one shape, or tokens "
            f"under the names {', '.join(FILLS)}, which are filled up"
        )
    return rows


def _tensor(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise CorpusError(
            f"the column {name!r} holds no numbers: got an array of {array.dtype}; encode it, or leave it out"
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _filled(name: str, rows: list[np.ndarray]) -> Tensor:
    fill = next(value for end, value in FILLS.items() if name.endswith(end))
    filled_NT = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for n, row in enumerate(rows):
        if row.dtype.kind not in "biu" and len(row):
            raise CorpusError(
                f"the column {name!r} is not whole numbers: got {row.dtype} in row {n}; give the ids of tokens"
            )
        filled_NT[n, : len(row)] = row
    return torch.from_numpy(filled_NT)
