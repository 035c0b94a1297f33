"""Write the logs of small evaluations into tests/fixtures, by the tools themselves: python tests/make_evaluation_fixtures.py

It needs inspect_ai (0.3.285) and lm_eval (0.4.13), which the tests do without.
"""

import json
import shutil
import sys
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures" / "evaluations"
LONG = "the river runs past the old mill, and the people of the town say that it has always been so; " * 3


def inspect(folder: Path) -> None:
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import choice, match
    from inspect_ai.solver import generate, multiple_choice, system_message

    capitals = [
        Sample(id="france", input="what is the capital of france?", target="paris", metadata={"topic": "west"}),
        Sample(id="japan", input=LONG + "what is the capital of japan?", target=["tokyo", "edo"]),
        Sample(id="peru", input="what is the capital of peru?", target="lima"),
    ]
    said = ["i think that it is paris", "well, it is kyoto", "it is cusco"]
    task = Task(name="capitals", dataset=capitals, solver=[system_message("be brief"), generate()], scorer=match())
    chosen = [
        Sample(id=1, input="which is a river?", choices=["mill", "rhine", "town"], target="B"),
        Sample(id=2, input="which is a town?", choices=["rhine", "mill", "bonn"], target="C"),
    ]
    letters = Task(name="letters", dataset=chosen, solver=multiple_choice(), scorer=choice())
    for made, answers, form in (
        (task, said, "eval"),
        (task, said, "json"),
        (letters, ["ANSWER: A", "ANSWER: C"], "eval"),
    ):
        outputs = [ModelOutput.from_content("mockllm/model", text) for text in answers]
        for output in outputs:
            output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        model = get_model("mockllm/model", custom_outputs=outputs, memoize=False)
        (log,) = eval(made, model=model, log_dir=str(folder / "raw"), log_format=form, display="none", max_samples=1)
        assert log.status == "success", log.error
        Path(log.location.removeprefix("file://")).rename(folder / f"{made.name}.{form}")
    shutil.rmtree(folder / "raw")


def harness(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    class Mock(LM):
        """It prefers short answers, and always says the same."""

        def loglikelihood(self, requests: list[Instance]):
            return [(-float(len(x.args[1])), False) for x in requests]

        def loglikelihood_rolling(self, requests):
            return [0.0] * len(requests)

        def generate_until(self, requests):
            return [" it is 41\nor so" for _ in requests]

    rows = folder / "rows.jsonl"
    docs = [
        {"q": "the river runs past the", "choices": ["old town", "mill"], "gold": 0, "number": "42"},
        {"q": "the people of the", "choices": ["town", "old river"], "gold": 0, "number": "41"},
    ]
    rows.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(rows)},
        "test_split": "train",
        "metadata": {},
    }
    choice = common | {
        "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    number = common | {
        "task": "number", "output_type": "generate_until", "doc_to_text": "{{q}} count?", "doc_to_target": "{{number}}",
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "digits", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
    }  # fmt: skip
    found = simple_evaluate(Mock(), tasks=[choice, number], log_samples=True, bootstrap_iters=0)
    assert found is not None
    tracker = EvaluationTracker(output_path=str(folder / "raw"))
    tracker.general_config_tracker.model_name_sanitized = "mock"
    tracker.date_id = "2026-11-01T10-00-00.000000"
    for name, samples in found["samples"].items():
        tracker.save_results_samples(name, samples)
    for path in (folder / "raw" / "mock").iterdir():
        path.rename(folder / path.name)
    rows.unlink()
    shutil.rmtree(folder / "raw")


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or ["inspect", "harness"]:
        {"inspect": inspect, "harness": harness}[name](FIXTURES)
