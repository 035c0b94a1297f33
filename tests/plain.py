"""torch's own operations in the place of ``upriver.kernels``: everything must run with them and give the same numbers.

python tests/plain.py    # the golden numbers with them: the largest difference, as a share of the range
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch

LONGEST, SIDES = 0, 2
FastKernels = nullcontext
syevd = torch.linalg.eigh


def aligned(n):
    return n


def suits(x, y, bias=None):
    return False


def matmul(x, y, bias=None):
    return x @ y if bias is None else x @ y + bias


def add_second_moment(total, x):
    total += (x.T @ x).to(total.dtype)


def side_by_side(work, items, device):
    return map(work, items)


@contextmanager
def one_core_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


if __name__ == "__main__":
    sys.modules["upriver.kernels"] = sys.modules["__main__"]
    import tempfile
    from pathlib import Path

    import numpy as np

    import golden

    kept = np.load(golden.KEPT)
    worst = 0.0
    for name in golden.MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for key, value in golden.small(name, Path(folder)).items():
                if not key.endswith("top"):
                    worst = max(worst, golden.difference(value, kept[f"{name}: {key}"]))
    print(worst)
