"""Which device is taken, how exact its products are, and what happens where its memory runs out; no GPU is needed.

Axes: N sequences, T tokens, I a side of a matrix.
"""

import numpy as np
import pytest
import torch
from torch import nn

import upriver as up
from cases import CASES, Windows
from in_memory import TokenCorpus, TokenQueries
from upriver.curvature.fit import Factors, fit
from upriver.errors import ConfigError, NumericalError, ResourceError
from upriver.model.load import Model
from upriver.pipeline import trace
from upriver.runtime.artifact import Artifact
from upriver.runtime.device import float32_products, pick_device
from upriver.runtime.units import each, total
from upriver.tensors import eigh

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------ which device


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, and which of them were made current."""
    chosen: list[torch.device] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_process_of_torchrun_takes_the_gpu_of_its_own(name, two_gpus, monkeypatch):
    assert pick_device(name) == torch.device("cuda:0")
    assert two_gpus == []  # the process alone is left as it is
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(name) == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]


def test_a_device_that_is_named_is_taken_whatever_torchrun_says(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [pick_device(name) for name in ("cuda:0", "cpu")] == [torch.device("cuda:0"), CPU]
    assert two_gpus == []


def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(two_gpus, monkeypatch):
    with pytest.raises(ConfigError, match=r"got 'cuda:7'.* has 2 GPUs"):
        pick_device("cuda:7")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"got 'cuda:2'.* has 2 GPUs"):
        pick_device("auto")


def test_a_machine_without_a_gpu_gives_its_cpu_and_refuses_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_device("auto") == CPU
    with pytest.raises(ConfigError, match="has 0 GPUs"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "xpu:1", "meta"])
def test_other_kinds_of_device_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"the device {name.partition(':')[0]} is not supported: .*use cpu or cuda"):
        pick_device(name)


def test_what_is_no_device_is_refused():
    with pytest.raises(ConfigError, match="no such device: got 'gpu0'"):
        pick_device("gpu0")


# ------------------------------------------------------------------------------------------ TF32


def settings() -> dict[str, object]:
    """All that torch tells of float32 products; what it refuses to tell is a setting too."""
    found: dict[str, object] = {}
    places = {"matmul": torch.backends.cuda.matmul, "cudnn": torch.backends.cudnn, "all": torch.backends}
    places |= {f"cudnn.{x}": getattr(torch.backends.cudnn, x, None) for x in ("conv", "rnn")}
    places |= {f"mkldnn.{x}": getattr(torch.backends.mkldnn, x, None) for x in ("matmul", "conv", "rnn")}
    for name, place in places.items():
        for attribute in ("fp32_precision", "allow_tf32"):
            try:
                found[f"{name} {attribute}"] = getattr(place, attribute, None)
            except RuntimeError:
                found[f"{name} {attribute}"] = "refused"
    try:
        found["precision"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["precision"] = "refused"
    return found


def _older(matmul: str, cudnn: bool):
    def change() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn

    return change


def _newer(place: str, value: str):
    def change() -> None:
        at = torch
        for name in place.split("."):
            at = getattr(at, name)
        if not hasattr(at, "fp32_precision"):
            pytest.skip("an older torch, without these settings")
        at.fp32_precision = value

    return change


CHANGES = {
    "nothing": lambda: None,
    "high": _older("high", True),
    "medium": _older("medium", False),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "one": _newer("backends.cuda.matmul", "tf32"),
    "convolutions": _newer("backends.cudnn.conv", "ieee"),
    "cudnn": _newer("backends.cudnn", "tf32"),
    "all": _newer("backends", "tf32"),
}


@pytest.fixture(params=CHANGES)
def changed(request):
    """The user's process has set what it likes."""
    with float32_products(False):  # which puts everything back
        pass
    before = settings()
    with float32_products(torch.backends.cuda.matmul.allow_tf32):
        CHANGES[request.param]()
        yield settings()
    assert settings() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_are_what_was_asked_for_and_the_process_gets_its_settings_back(changed, tf32):
    with float32_products(tf32):
        inside = settings()
        assert inside["matmul allow_tf32"] == inside["cudnn allow_tf32"] == tf32
        assert inside["precision"] == ("high" if tf32 else "highest")
        assert inside["matmul fp32_precision"] in (None, "tf32" if tf32 else "ieee")
        assert inside["cudnn.conv fp32_precision"] in (None, "tf32" if tf32 else "ieee")
        assert inside["mkldnn.matmul fp32_precision"] in (None, "none", "ieee")
        with float32_products(not tf32):
            assert settings()["matmul allow_tf32"] != tf32
        assert settings() == inside
    assert settings() == changed
    with pytest.raises(KeyError), float32_products(tf32):
        raise KeyError
    assert settings() == changed
