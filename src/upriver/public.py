"""The public names of the package, which ``upriver`` loads when the first of them is asked for."""

from upriver.curvature.base import Curvature, Damping, Solution
from upriver.curvature.fit import Factors, fit
from upriver.errors import UpriverError
from upriver.influence.queries import Measurements, gradients
from upriver.model.check import tracked_layers
from upriver.model.generate import complete
from upriver.model.load import Model, load_model
from upriver.model.losses import Classification, LanguageModel, Regression, Task
from upriver.model.sweep import Labels, Source, sweep
from upriver.pipeline import trace
from upriver.proof import verify
from upriver.show.report import write_report as report
from upriver.show.scores import Scores
from upriver.text.batch import Examples
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries

__all__ = [
    "Classification", "Corpus", "Curvature", "Damping", "Examples", "Factors", "Labels", "LanguageModel", "Measurements",
    "Model", "Queries", "Regression", "Scores", "Solution", "Source", "Task", "UpriverError", "complete", "fit", "gradients",
    "load_model", "report", "sweep", "trace", "tracked_layers", "verify",
]  # fmt: skip
