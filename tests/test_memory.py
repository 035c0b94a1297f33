"""What becomes of freed memory: kept for the next tensors where the limit leaves room, else given back at once."""

import subprocess
import sys

import pytest
import torch
from upriver.runtime.split import SEQUENCE_BYTES, Budget

from upriver.model import memory
from upriver.model.load import Model
from upriver.model.losses import Regression
from upriver.model.memory import ROOMY, settle
from upriver.runtime import system
from upriver.text.batch import Examples

FAULTS = """
import resource, torch
from upriver.runtime.system import settle_memory
settle_memory(reuse={reuse})
for _ in range(24):  # until the heap has grown: a small allocation may take a corner of what was freed
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="an option of the C library of Linux")
def test_kept_memory_is_touched_once():
    def faults(reuse: bool) -> int:
        code = FAULTS.format(reuse=reuse)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert 8 * faults(True) < faults(False)


@pytest.mark.parametrize(("limit", "kept"), [(1.01 * ROOMY, True), (0.99 * ROOMY, False)])
def test_memory_is_kept_where_the_largest_pass_leaves_room(limit, kept, monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "settle_memory", lambda reuse: seen.append(reuse))
    peak, job = {"covariance": 10**8, "correction": 10**9}, Budget(int(limit * 10**9), 0, 100, 100)
    settle(peak, job, torch.device("cuda"))  # another memory than that of the process
    assert seen == []
    settle(peak, job, torch.device("cpu"))
    assert seen == [kept]


def test_what_a_control_group_holds_of_files_is_free(tmp_path):
    """A run writes and reads many gigabytes of files, which stay in memory until something else wants it."""
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("1000\n")
    used.write_text("900\n")
    assert system._group_left((limit, used)) == 100
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 600\nactive_file 100\n")
    assert system._group_left((limit, used)) == 700
    (tmp_path / "memory.stat").write_text("inactive_file 0\ntotal_inactive_file 700\n")
    assert system._group_left((limit, used)) == 800
    limit.write_text("max\n")
    assert system._group_left((limit, used)) is None


def test_the_places_of_sequences_are_taken_memory_and_raise_no_limit(monkeypatch):
    monkeypatch.setattr(memory, "resident_memory", lambda: 10**8)
    monkeypatch.setattr(system, "available_memory", lambda: 10**9)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    model = Model(torch.nn.Linear(3, 1), task=Regression())
    few, many = (memory.memory_budget(model, Examples({"x": torch.randn(n, 3)}), 100, None) for n in (10, 1010))
    assert few.limit == many.limit == 9 * 10**8
    assert (few.fixed, many.fixed) == (10**8 + 10 * SEQUENCE_BYTES, 10**8 + 1010 * SEQUENCE_BYTES)


def test_neighbours_share_what_is_free(monkeypatch):
    monkeypatch.setattr(system, "available_memory", lambda: 10**9)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = system.default_limit(10**8) - 10**8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert system.default_limit(10**8) - 10**8 == alone / 4 == 2 * 10**8
