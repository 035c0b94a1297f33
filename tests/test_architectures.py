"""Types of transformers, of each kind some, go through fit and trace; what is said of them is what the page of documents says.

All of them go through ``python tests/architectures.py``.
"""

import re
from pathlib import Path

import pytest
import torch

import upriver as up
from architectures import EQUAL, HEADER, examined, mlp_parameters, row, texts
from small import CAUSAL, SEEING, build
from upriver.model.capture import frozen
from upriver.model.check import tracked_layers
from upriver.model.coverage import coverage
from upriver.model.experts import run_through_interface
from upriver.model.head import decide_ending, ending, whole_logits
from upriver.model.layers import find_layers
from upriver.model.shape import config_shape
from upriver.model.text_part import other_parts

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text()
DENSE = (
    "gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon", "mpt", "llama", "gemma2", "phi", "phi3", "cohere", "starcoder2", "glm",
)  # fmt: skip
FLAGS = {  # of the interface of experts: bias, transposed, concatenated, gate; and what stands beside experts
    "mixtral": (False, False, True, True),
    "gpt_oss": (True, True, False, True),
    "aria_text": (False, True, True, True),
    "nemotron_h": (False, False, True, False),
    "qwen2_moe": (False, False, True, True),  # a shared expert behind a gate
    "deepseek_v3": (False, False, True, True),  # shared experts, a router in groups
    "zaya": (False, False, True, True),  # a router of several layers
}
HYBRIDS = ("lfm2", "recurrent_gemma", "rwkv", "mamba", "mamba2", "jamba", "zamba2", "falcon_h1", "xlstm")
SEES = ("gemma3", "gemma4", "llava")
# Raised inside transformers for lack of optional kernels, or by torch about its own operators:
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("name", [*DENSE, *FLAGS, *HYBRIDS, *SEES])
def test_architecture_goes_through_fit_and_trace(name, given, tmp_path):
    module = build(name)
    assert_its_end_is_that_of_the_model(module)
    told = examined(name, tmp_path, given, module)
    assert row(told) in PAGE.splitlines()
    assert told["off"] < EQUAL
    assert 0 < told["all"] < 1
    head = module.get_output_embeddings()
    assert all(m is not head for x in find_layers(module, "all") for m in x.modules)
    if name in DENSE or name in FLAGS:
        assert told["of_mlp"] > 0.95
    if name in FLAGS:
        assert any(x.pool for x in up.Factors(tmp_path / "factors").layers)
        (kind,) = {
            (m.has_bias, m.is_transposed, m.is_concatenated, m.has_gate)
            for m in module.modules()
            if run_through_interface(m)
        }
        assert kind == FLAGS[name]


def assert_its_end_is_that_of_the_model(module):
    """In a linear head, or in a tail of its own."""
    tokens_NT = torch.arange(2, 26).view(2, 12)
    decide_ending(module)
    with torch.no_grad(), frozen(module):
        logits_MV, end = whole_logits(module, tokens_NT).flatten(0, 1), ending(module)
        assert end is not None
        hidden_MH = end.hidden(module, tokens_NT).flatten(0, 1)
        torch.testing.assert_close(end.logits(hidden_MH[7:19], False)[0], logits_MV[7:19])


@pytest.mark.parametrize("name", SEES)
def test_what_sees_means_its_text_part_unless_another_is_named(name):
    module = build(name)
    others = other_parts(module)
    assert others
    for spec in ("mlp", "attention", "all"):
        layers = find_layers(module, spec)
        assert not any(x.name.startswith(tuple(others)) for x in layers)
        said = {u["name"]: u["why"] for u in coverage(module, layers).untracked}
        assert {said[part] for part in others} == {"not of the text part"}
    assert find_layers(module, f"{others[0]}.*")


def test_the_table_in_the_docs_has_each_of_them():
    """What some of its rows say is compared above."""
    assert PAGE.startswith(HEADER)
    rows = [name for name in re.findall(r"(?m)^\| (\S+) \|", PAGE) if name not in ("type", "---")]
    assert rows[: len(CAUSAL)] == CAUSAL
    assert {*SEES} & {*SEEING} <= {*rows[len(CAUSAL) :]} <= {*SEEING}


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen3_5"])
def test_a_checkpoint_of_a_model_that_sees_is_loaded_whole_and_traced_by_its_text_part(name, given, tmp_path):
    module = build(name, "Qwen3_5ForConditionalGeneration" if name == "qwen3_5" else None)
    module.save_pretrained(tmp_path)
    given[0].save_pretrained(tmp_path)
    model = up.load_model(tmp_path)
    assert type(model.module) is type(module)
    found = coverage(model.module, tracked_layers(model, given[1], "mlp"))
    assert "not of the text part" in found.line()
    assert found.tracked == sum(p.numel() for p in mlp_parameters(module))
    assert sum(x.O * x.I for x in config_shape(config_alone(module, tmp_path), "mlp")[1].layers) == found.tracked


def config_alone(module, folder: Path) -> Path:
    (folder / "alone").mkdir()
    module.config.save_pretrained(folder / "alone")
    return folder / "alone"
