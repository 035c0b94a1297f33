"""Our side of the comparison, and the plain training step that times are given in."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from job import Job, load_module
from meter import Meter

import upriver as up
from upriver.influence.forecast import divide
from upriver.influence.job import Given
from upriver.influence.job import Job as Trace
from upriver.influence.queries import Measurements
from upriver.influence.scan import Scanned, scan, scan_units
from upriver.influence.solve import solve
from upriver.model.check import tracked_layers
from upriver.model.load import Model
from upriver.runtime.artifact import Artifact
from upriver.runtime.config import BATCH_TOKENS, TraceOptions, options
from upriver.runtime.progress import mute, silent
from upriver.runtime.system import give_back
from upriver.text.examples import Examples


class Sequences(Examples):
    """Sequences of one length; the tokens after the first ``prompt`` carry loss."""

    def __init__(self, tokens_NT: np.ndarray, prompt: int):
        rows, length = tokens_NT.shape
        loss_NT = (torch.arange(length) >= prompt).repeat(rows, 1)
        super().__init__({"tokens": torch.from_numpy(tokens_NT), "loss": loss_NT})
        self.lengths_N = np.full(rows, length, np.int32)


class Side:
    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self.model = Model(load_module(job, torch.float32))
        self.corpus, self.batch_tokens = Sequences(job.corpus_NT, 1), BATCH_TOKENS
        self.settings = (
            f"upriver {version('upriver')}, {BATCH_TOKENS} tokens a batch, memory {job.memory or 'not limited'}"
        )
        self.step(Meter())  # warm up: threads, buffers

    def fit(self, meter: Meter) -> None:
        with meter("other"):
            self.factors = self._fit("factors", self.job.dtype, meter)

    def _fit(self, name: str, dtype: str, meter: Meter) -> up.Factors:
        @contextmanager
        def phase(name: str, total: int) -> Iterator:
            with meter(name):
                yield lambda done: None

        return up.fit(
            self.model, self.corpus, self.folder / name, fisher=self.job.fisher, dtype=dtype, max_tokens=None, overwrite=True,
            batch_tokens=self.batch_tokens, memory=self.job.memory, progress=phase,
        )  # fmt: skip

    def score(self, meter: Meter, queries: int, rank: int | None) -> tuple[np.ndarray, int]:
        return self._score(meter, queries, rank, self.factors, self.job.dtype)

    def _score(
        self, meter: Meter, queries: int, rank: int | None, factors: up.Factors, dtype: str
    ) -> tuple[np.ndarray, int]:
        """As :func:`upriver.trace` does it: solved in float32, scanned in ``dtype``; nothing is scored a second time."""
        place = self.folder / "scores"
        shutil.rmtree(place, ignore_errors=True)  # nothing is left to resume from
        with meter("other"):
            trace = self._trace(place, queries, rank, factors, dtype)
            with meter("solve"):
                solved = solve(trace)
                give_back()
            stored = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            with meter("scan"), self.model.computing_in(dtype) as computing:
                layers = tracked_layers(computing, self.corpus, "mlp")
                parts = scan(trace._replace(model=computing, layers=layers), solved, mute)
        scanned = Scanned(scan_units(trace), parts, queries, None)
        return np.concatenate([scores_CQ for _, scores_CQ in scanned.chunks()]), stored

    def _trace(self, place: Path, queries: int, rank: int | None, factors: up.Factors, dtype: str) -> Trace:
        given = {"rank": rank or "full", "batch_tokens": self.batch_tokens, "memory": self.job.memory, "dtype": dtype}
        opts = options(TraceOptions, given)
        asked = Measurements(Sequences(self.job.queries_QT[:queries], self.job.prompt))
        layers, rows = tracked_layers(self.model, self.corpus, "mlp"), np.arange(len(self.corpus))
        division = divide(Given(self.model, self.corpus, asked, factors, opts, (), silent, mute), layers, None)
        stage = Artifact.open(place, "trace", {})
        return Trace(
            stage, self.model, layers, self.corpus, asked, factors, rows, opts, silent, division, factors.curvature()
        )

    def reference(self, queries: int) -> np.ndarray:
        """Scores in float32 at full rank, from factors in float32."""
        meter = Meter()
        self.exact = getattr(self, "exact", None) or self._fit("exact", "float32", meter)
        return self._score(meter, queries, None, self.exact, "float32")[0]

    def step(self, meter: Meter) -> None:
        """A plain forward and full backward pass over the corpus in float32, every parameter with a gradient."""
        module = self.model.module.train()
        with meter("step"):
            for rows in self.corpus.plan(self.job.batch * self.job.tokens):
                tokens_NT = self.corpus.batch(rows).inputs["tokens"]
                module(input_ids=tokens_NT, labels=tokens_NT, use_cache=False).loss.backward()
                module.zero_grad(set_to_none=True)
        module.eval()
