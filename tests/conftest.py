"""One thread, no network, and a cache of its own for the whole run."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="upriver-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["UPRIVER_CACHE"] = _CACHE.name

import pytest  # noqa: E402 - the environment comes first: libraries read it when they are imported
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
