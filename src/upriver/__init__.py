"""Upriver follows a language model's answer upriver, to the training text it came from.

Example:
    >>> import upriver as up
    >>> model = up.load_model("path/or/name")
    >>> corpus = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=512)
    >>> factors = up.fit(model, corpus, out="factors")
    >>> result = up.trace(model, corpus, up.Queries.read("queries.jsonl"), factors, out="scores")
    >>> result.top("q1", 10)  # a pandas frame
    >>> result.report("report.html")
"""

import os

# Idle worker threads spin for milliseconds by default and slow down the busy ones: NumPy's and SciPy's those of torch, torch's
# those of NumPy and of other programs.  Waking one that sleeps takes longer than a small operation, so torch's spin for a moment,
# until the next one comes (benchmarks/waiting.py).  The libraries read these when they are loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

from upriver.curvature.base import Curvature, Damping, Solution
from upriver.curvature.fit import Factors, fit
from upriver.errors import UpriverError
from upriver.influence.gradients import Measurements
from upriver.model.generate import complete
from upriver.model.load import Model, load_model
from upriver.model.losses import Classification, LanguageModel, Regression, Task
from upriver.pipeline import trace
from upriver.show.report import write_report as report
from upriver.show.scores import Scores
from upriver.text.batch import Examples
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries

__all__ = [
    "Classification", "Corpus", "Curvature", "Damping", "Examples", "Factors", "LanguageModel", "Measurements", "Model",
    "Queries", "Regression", "Scores", "Solution", "Task", "UpriverError", "complete", "fit", "load_model", "report",
    "trace",
]  # fmt: skip
