"""The public names of the package, which ``upriver`` loads when the first of them is asked for."""

from upriver.curvature.base import Curvature, Damping, Solution
from upriver.curvature.fit import Factors, fit
from upriver.errors import UpriverError
from upriver.evaluate.baselines import baseline
from upriver.evaluate.lds import Bank, lds
from upriver.evaluate.metagradient import metagradients
from upriver.evaluate.retrain import leave_out, random_subsets, retrain
from upriver.evaluate.training import Recipe, Trainer
from upriver.influence.queries import Measurements, gradients
from upriver.influence.self_influence import self_influence
from upriver.model.check import tracked_layers
from upriver.model.generate import complete
from upriver.model.load import Model, load_model
from upriver.model.losses import LanguageModel, Task
from upriver.model.preference import Preference, Reward, preference_examples
from upriver.model.sweep import Labels, Source, sweep
from upriver.model.tasks import BinaryClassification, Classification, Regression
from upriver.pipeline import trace
from upriver.proof import verify
from upriver.show.audit import Audit
from upriver.show.export import export
from upriver.show.groups import by_group
from upriver.show.report import write_report as report
from upriver.show.scores import Scores
from upriver.suspects import audit
from upriver.text.corpus import Corpus
from upriver.text.examples import Examples
from upriver.text.queries import Queries

__all__ = [
    "Audit", "Bank", "BinaryClassification", "Classification", "Corpus", "Curvature", "Damping", "Examples", "Factors", "Labels",
    "LanguageModel", "Measurements", "Model", "Preference", "Queries", "Recipe", "Regression", "Reward", "Scores", "Solution",
    "Source", "Task", "Trainer", "UpriverError", "audit", "baseline", "by_group", "complete", "export", "fit", "gradients", "lds",
    "leave_out", "load_model", "metagradients", "preference_examples", "random_subsets", "report", "retrain", "self_influence",
    "sweep", "trace", "tracked_layers", "verify",
]  # fmt: skip
