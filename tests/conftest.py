"""One thread, no network, and a cache of its own for the whole run."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="upriver-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # as the command line sets it
os.environ["UPRIVER_CACHE"] = _CACHE.name

import importlib.util  # noqa: E402 - the environment comes first: libraries read it when they are imported
from functools import cache  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """``fitted(name, **options)``: the factors of a tiny case with the diagonal, in float64, made once."""
    from cases import case
    from upriver.curvature.diagonal import fit_diagonal
    from upriver.curvature.fit import Factors, fit

    @cache
    def make(name: str, **options) -> Factors:
        c, out = case(name), tmp_path_factory.mktemp(name)
        factors = fit(c.model, c.data, out, **{"layers": c.spec, "dtype": "float64", "batch_tokens": 30, **options})
        fit_diagonal(c.model, c.data, factors)
        return factors

    return make


@pytest.fixture(scope="module")
def study(request):
    """The script that a module of tests names as ``STUDY``: scripts are in no package, and several have one name."""
    spec = importlib.util.spec_from_file_location(f"study_{request.module.__name__}", request.module.STUDY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
