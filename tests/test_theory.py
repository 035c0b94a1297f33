"""What the page of the theory says computes a formula is there."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "theory.md").read_text()
ROOMS = "model|curvature|influence|evaluate|show|tensors"
NAMES = sorted(set(re.findall(rf"(?<![\w./])(?:{ROOMS})(?:\.\w+)+(?![\w/]|\.\w)", PAGE)))
FORMULAS = [line for line in PAGE.splitlines() if re.match(r"    .*=", line)]


def found(name: str) -> object:
    """The object of a dotted name: the module as far as there are modules, then attributes."""
    parts = f"upriver.{name}".split(".")
    for end in range(len(parts), 0, -1):
        try:
            here = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            here = getattr(here, part)
        return here
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_computes_a_formula_exists(name):
    assert callable(found(name))


def test_a_name_that_is_not_there_would_be_told():
    with pytest.raises(AttributeError):
        found("curvature.blocks.Eigenblock.nothing")
    assert len(NAMES) > 30


def test_every_numbered_equation_names_its_function_but_one_on_the_way():
    numbered = [line for line in FORMULAS if re.search(r"  \(\d", line)]
    without = [line for line in numbered if not any(name in line for name in NAMES)]
    assert len(numbered) >= 12
    assert [line.split("(")[-1] for line in without] == ["3)"], "eq. 3 is a step of the derivation"
