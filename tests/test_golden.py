"""The numbers of the small models and of a slice of the demo stay as they were kept (``tests/golden.py``)."""

from functools import cache

import numpy as np
import pytest

import golden

KEPT = np.load(golden.KEPT)
TOLERANCE = 1e-5  # of the range: float32 sums of another order


@cache
def found(name: str, tmp: str) -> golden.Numbers:
    from pathlib import Path

    folder = Path(tmp)
    return golden.demo(folder) if name == "demo" else golden.small(name, folder)


@pytest.mark.parametrize("name", [*golden.MODELS, "demo"])
def test_numbers_are_those_that_are_kept(name: str, tmp_path):
    numbers = found(name, str(tmp_path))
    kept = {key.removeprefix(f"{name}: "): KEPT[key] for key in KEPT.files if key.startswith(f"{name}: ")}
    assert numbers.keys() == kept.keys()
    for key, value in kept.items():
        if key.endswith("top"):
            assert numbers[key].tolist() == value.tolist(), key
        else:
            assert golden.difference(numbers[key], value) <= TOLERANCE, key
