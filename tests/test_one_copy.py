"""A model stands in the memory once, in the type that it computes in, and is the same model in every type."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import upriver as up
from cli_cases import build, save_model, tiny_llama
from upriver.errors import MismatchError
from upriver.model.weights import weights_of

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(9)[None]


def saved(folder: Path, dtype: torch.dtype = torch.float32, times: float = 1.0, **sizes) -> Path:
    module = tiny_llama(**(SMALL | sizes)).to(dtype)
    with torch.no_grad():
        next(module.parameters()).mul_(times)
    return save_model(folder, module)


def copied(model: up.Model) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in weights_of(model.module).items()}


def same(model: up.Model, before: dict[str, torch.Tensor]) -> bool:
    now = weights_of(model.module)
    return all(torch.equal(now[name], x) and now[name].dtype == x.dtype for name, x in before.items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_the_same_in_every_type_that_it_is_loaded_in(tmp_path, stored):
    place = saved(tmp_path, stored)
    models = [up.load_model(place, dtype, "cpu") for dtype in ("float32", "bfloat16", "float64")]
    assert len({model.fingerprint for model in models}) == 1
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_that_was_loaded_is_converted_in_place_and_back(tmp_path, stored, loaded):
    place = saved(tmp_path, stored)
    wide, model = up.load_model(place, "float32", "cpu"), up.load_model(place, loaded, "cpu")
    before, logits = copied(model), wide.module(IDS).logits
    with model.computing_in("bfloat16") as narrow:
        assert narrow.module is model.module
        assert narrow.dtype == torch.bfloat16
        assert narrow.fingerprint == wide.fingerprint
        with narrow.computing_in("float32") as inner:
            assert inner.module is model.module
            torch.testing.assert_close(inner.module(IDS).logits, logits, rtol=0, atol=0)
        assert narrow.dtype == torch.bfloat16
    assert same(model, before)


def test_a_model_that_was_changed_since_is_copied(tmp_path):
    model = up.load_model(saved(tmp_path), device="cpu")
    with torch.no_grad():
        next(model.module.parameters())[0, 0] += 1
    before = copied(model)
    assert model.more_in("bfloat16") == 2 * model.n_parameters
    with model.computing_in("bfloat16") as narrow:
        assert narrow.module is not model.module
    assert same(model, before)


def test_files_that_changed_meanwhile_are_refused(tmp_path):
    model = up.load_model(saved(tmp_path), "bfloat16", "cpu")
    saved(tmp_path, times=1.5)
    with pytest.raises(MismatchError, match="the model's files were changed while they were in use"), \
         model.computing_in("float32"):  # fmt: skip
        pass
    assert model.dtype == torch.bfloat16


def test_scores_do_not_depend_on_the_type_that_a_model_was_loaded_in(tmp_path):
    tables, tiny = [], build(tmp_path)
    for loaded in ("float32", "bfloat16"):
        model = up.load_model(tiny.model, loaded, "cpu")
        corpus = up.Corpus.read(tiny.corpus, model.tokenizer, seq_len=16)
        factors = up.fit(model, corpus, tmp_path / loaded / "factors", dtype="bfloat16")
        queries = up.Queries.read(tiny.queries, model.tokenizer)
        found = up.trace(model, corpus, queries, factors, tmp_path / loaded / "scores", top=3, dtype="bfloat16")
        tables.append(found.frame().to_json())
        assert found.manifest["model"]["exact_dtype"] == "float32"
        assert model.dtype == getattr(torch, loaded)
    assert tables[0] == tables[1]


PEAK = """
import resource, sys, torch, upriver as up
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = up.load_model(sys.argv[1], sys.argv[2], "cpu")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start))
"""


def test_loading_takes_no_more_than_the_model_in_its_type(tmp_path):
    place = saved(tmp_path, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6)
    weights = (place / "model.safetensors").stat().st_size
    assert weights > 150e6
    run = [sys.executable, "-c", "import upriver as up; up.load_model; " + PEAK, str(place), "bfloat16"]
    peak = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert peak < 0.5 * weights + 40e6
