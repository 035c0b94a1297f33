"""A corpus and questions of token ids held in memory, with what the passes ask of them and nothing else.

Axes: N sequences, T tokens, Q queries.
"""

import numpy as np
import torch

from upriver.runtime.artifact import digest
from upriver.text import batch as batches
from upriver.text.batch import Batch, Sequences


class TokenCorpus(Sequences):
    """Sequences of token ids; the first ``prompts[n]`` tokens of a sequence (default: one) carry no loss."""

    def __init__(self, tokens: list[np.ndarray], prompts: list[int] | None = None):
        self.tokens = [np.asarray(t, np.int64) for t in tokens]
        self.prompts = prompts or [1] * len(tokens)
        self.lengths_N = np.array([len(t) for t in tokens], np.int32)
        self.loss = [np.arange(len(t)) >= prompt for t, prompt in zip(self.tokens, self.prompts, strict=True)]
        hashes = [batches.sequence_hash(*pair) for pair in zip(self.tokens, self.loss, strict=True)]
        self.keys_N = batches.sequence_keys(np.array(hashes, np.uint64))
        self.fingerprint = digest([[t.tolist() for t in self.tokens], self.prompts])

    def batch(self, rows: np.ndarray) -> Batch:
        tokens, loss = ([part[row] for row in rows] for part in (self.tokens, self.loss))
        return batches.pad(rows, self.keys_N[rows], tokens, loss)


class TokenQueries:
    """Prompts with completions as token ids: ``prompts[q]`` tokens of ``tokens[q]`` are the prompt, the rest is scored."""

    def __init__(self, tokens: list[np.ndarray], prompts: list[int]):
        self.tokens, self.prompts = tokens, prompts
        self.ids = [f"q{i}" for i in range(len(tokens))]
        self.fingerprint = digest([[t.tolist() for t in tokens], list(map(int, prompts))])
        self.lengths = np.array([len(t) for t in tokens], np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: list[int]) -> Batch:
        index_Q = np.asarray(indices, np.int64)
        tokens = [self.tokens[i] for i in index_Q]
        scored = [np.arange(len(t)) >= self.prompts[i] for i, t in zip(index_Q, tokens, strict=True)]
        padded = batches.pad(index_Q, np.zeros(len(index_Q), np.uint64), tokens, scored)
        return Batch(
            padded.rows_N, padded.keys_N, padded.inputs, padded.real_NT, torch.ones(len(index_Q)), query_N=index_Q
        )


def ragged(tokens_NT: np.ndarray, lengths_N: np.ndarray) -> list[np.ndarray]:
    """The rows of a padded table, without their padding."""
    return [row[:length] for row, length in zip(tokens_NT, lengths_N, strict=True)]
