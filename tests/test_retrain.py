"""The bank of retrained models: what is in it, that it goes on, that processes share the work; and the score made of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import upriver as up
from cases import case
from upriver.errors import ConfigError, MismatchError, NumericalError, StorageError
from upriver.influence.queries import measurements

RECIPE = up.Recipe(10, 0.05)
SUBSETS = up.random_subsets(20, 4)
CALLS: list[tuple[int, int]] = []  # sequences and seed of what `stopping` has trained
ALLOWED = [0]

# A process of its own: it waits for the other, then takes part; with "die" it ends in the middle of its first model.
SHARING = """
import os, sys, time
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import upriver as up
from cases import case
torch.set_num_threads(1)
folder, me, how = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
c = case("classifier")
trainer = up.Trainer(c.model, c.data, up.Recipe(10, 0.05))

def wait(pattern, count):
    end = time.monotonic() + 100
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end
        time.sleep(0.01)

def train(rows, seed):
    (folder / f"begun-{me}-{seed}").touch()
    wait("begun-*", 2)  # both are at work
    if how == "die" and me == "a":
        wait("done-b-*", 5)
        os._exit(9)
    model = trainer(rows, seed)
    (folder / f"done-{me}-{seed}").touch()
    return model

(folder / f"ready-{me}").touch()
wait("ready-*", 2)
bank = up.retrain(train, up.random_subsets(20, 1), c.queries, folder / "bank", seeds=range(6), made_from="the same")
np.save(folder / f"values-{me}.npy", bank.values_MQ)
os._exit(0)  # threads of libraries may still be about: how they end is not what is asked here
"""


def trainer(recipe: up.Recipe = RECIPE) -> up.Trainer:
    return up.Trainer(case("classifier").model, case("classifier").data, recipe)


def stopping(rows, seed):
    if len(CALLS) == ALLOWED[0]:
        raise KeyboardInterrupt
    CALLS.append((len(rows), seed))
    return trainer()(rows, seed)


def test_the_bank_holds_what_each_model_does(tmp_path):
    c = case("classifier")
    bank = up.retrain(trainer(), SUBSETS, c.queries, tmp_path / "bank", seeds=(0, 1))
    assert bank.queries == c.queries.ids
    assert bank.seed_M.tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(bank.masks_MN, np.concatenate([SUBSETS, SUBSETS]))
    assert np.array_equal(bank.values_MQ[5], measurements(trainer()(np.flatnonzero(SUBSETS[1]), 1), c.queries))
    table = pq.read_table(tmp_path / "bank" / "bank.parquet").to_pandas()
    assert table.columns.tolist() == ["subset", "seed", "masks", "values"]
    assert table["subset"].tolist() == [0, 1, 2, 3] * 2
    left = {x.name for x in (tmp_path / "bank").iterdir() if x.name[0] != "."}
    assert left == {"bank.parquet", "key.json", "manifest.json"}


def test_a_language_model_from_scratch_is_retrained_as_any_other(tmp_path):
    c = case("gpt2")
    module = c.model.module
    train = up.Trainer(lambda: up.Model(type(module)(module.config)), c.data, up.Recipe(30, 0.01, 7))
    bank = up.retrain(train, up.leave_out(len(c.data), 5), c.queries, tmp_path / "bank")
    assert bank.values_MQ.shape == (4, 3)
    assert len(np.unique(bank.values_MQ[:, 0])) == 4


def test_it_goes_on_after_the_last_model(tmp_path):
    c = case("classifier")
    CALLS.clear()
    ALLOWED[0] = 3
    with pytest.raises(KeyboardInterrupt):
        up.retrain(stopping, SUBSETS, c.queries, tmp_path / "bank", seeds=(0, 1))
    with pytest.raises(MismatchError, match="no finished bank"):
        up.Bank.read(tmp_path / "bank")
    ALLOWED[0] = 8
    bank = up.retrain(stopping, SUBSETS, c.queries, tmp_path / "bank", seeds=(0, 1))
    assert CALLS == [(10, 0)] * 4 + [(10, 1)] * 4, "every model was trained once"
    whole = up.retrain(trainer(), SUBSETS, c.queries, tmp_path / "whole", seeds=(0, 1))
    assert np.array_equal(bank.values_MQ, whole.values_MQ)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["live", "die"])
def test_two_processes_given_the_same_call_share_the_work(how, tmp_path):
    (tmp_path / "share.py").write_text(SHARING)
    here = str(Path(__file__).parent)
    command = [sys.executable, str(tmp_path / "share.py"), here, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([*command, name, how], env=environment) for name in "ab"]
    try:
        codes = [process.wait(120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [9 if how == "die" else 0, 0]
    done = [{x.name.split("-")[2] for x in tmp_path.glob(f"done-{name}-*")} for name in "ab"]
    assert done[0] | done[1] == set("012345")
    assert not done[0] & done[1], "no model was trained twice"
    assert (len(done[1]) == 6) if how == "die" else (done[0] and done[1])
    values = np.load(tmp_path / "values-b.npy")
    c, mask_N = case("classifier"), up.random_subsets(20, 1)[0]
    expected = [measurements(trainer()(np.flatnonzero(mask_N), seed), c.queries) for seed in range(6)]
    assert np.array_equal(values, expected)
    if how == "live":
        assert np.array_equal(values, np.load(tmp_path / "values-a.npy"))


def test_another_bank_is_refused_and_the_same_is_used_as_it_is(tmp_path):
    c, folder = case("classifier"), tmp_path / "bank"
    bank = up.retrain(trainer(), SUBSETS, c.queries, folder)
    before = (folder / "bank.parquet").stat().st_mtime_ns
    assert np.array_equal(bank.values_MQ, up.retrain(trainer(), SUBSETS, c.queries, folder).values_MQ)
    assert (folder / "bank.parquet").stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match="another train"):
        up.retrain(trainer(up.Recipe(11, 0.05)), SUBSETS, c.queries, folder)
    with pytest.raises(MismatchError, match="another subsets"):
        up.retrain(trainer(), ~SUBSETS, c.queries, folder)
    (folder / "bank.parquet").write_bytes((folder / "bank.parquet").read_bytes()[:-1] + b"?")
    with pytest.raises(StorageError, match="checksum"):
        up.Bank.read(folder)


def test_a_folder_of_somebody_else_is_left_as_it_was(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(MismatchError, match="not an artifact"):
        up.retrain(trainer(), SUBSETS, case("classifier").queries, tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ["letter.txt"]


def test_subsets():
    assert up.leave_out(3).tolist() == [[True] * 3, [False, True, True], [True, False, True], [True, True, False]]
    assert up.leave_out(5, 2).sum(1).tolist() == [5, 3, 3, 4]
    assert up.leave_out(50, 3, count=7).sum(1).tolist() == [50] + [47] * 7
    halves_SN = up.random_subsets(51, 200)
    assert set(halves_SN.sum(1)) == {26}
    assert abs(halves_SN.mean(0) - 26 / 51).max() < 0.15, "every sequence is in about half of them"
    assert not np.array_equal(halves_SN, up.random_subsets(51, 200, seed=1))
    for bad in (lambda: up.leave_out(3, 3), lambda: up.random_subsets(3, 5, 0.01)):
        with pytest.raises(ConfigError, match="some but not all"):
            bad()
    with pytest.raises(ConfigError, match="none of them empty"):
        up.retrain(trainer(), np.zeros((2, 20), bool), case("classifier").queries, "nowhere")


# ---- the score


def linear(noise: float = 0.0, seeds: int = 1) -> tuple[up.Bank, np.ndarray]:
    """A made-up bank in which ``f`` is the sum of known effects, with noise, and these effects."""
    rng = np.random.default_rng(0)
    effect_NQ, masks_SN = rng.normal(size=(60, 12)), up.random_subsets(60, 100)
    masks = np.concatenate([masks_SN] * seeds)
    values = masks @ effect_NQ + noise * rng.normal(size=(len(masks), 12))
    return up.Bank.of(masks, values, np.repeat(np.arange(seeds), 100)), effect_NQ


def test_the_score_of_the_truth_is_one_and_of_its_opposite_minus_one():
    bank, effect_NQ = linear()
    assert up.lds(bank, effect_NQ)[:3] == pytest.approx((1, 1, 1))
    assert up.lds(bank, -3 * effect_NQ - 5)[:3] == pytest.approx((-1, -1, -1)), "halves are of one size"


def test_the_interval_of_random_scores_holds_zero_as_often_as_it_says():
    bank, effect_NQ = linear()
    rng = np.random.default_rng(1)
    found = [up.lds(bank, rng.normal(size=effect_NQ.shape), resamples=300) for _ in range(60)]
    assert np.mean([x.low <= 0 <= x.high for x in found]) >= 0.8
    assert abs(np.mean([x.mean for x in found])) < 0.03


def test_a_linear_model_that_is_retrained_has_the_score_of_its_exact_influence(tmp_path):
    """Ridge regression from few inputs, every subset trained to convergence: influence ranks its changes all but perfectly."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(200, 3)))
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.5 * torch.tensor(rng.normal(size=200))
    begin = up.Model(nn.Linear(3, 1).double(), task=up.Regression())
    data, decay = up.Examples({"x": x, "y": y}), 0.01
    asked = up.Measurements(up.Examples({"x": x[:10] + 0.1, "y": y[:10] + 1}))
    train = up.Trainer(begin, data, up.Recipe(200, 0.2, optimizer="sgd", weight_decay=decay))
    bank = up.retrain(train, up.random_subsets(200, 40), asked, tmp_path / "bank")
    model = train(np.arange(200), 0)
    result = up.trace(
        model, data, asked, out=tmp_path / "scores", curvature="exact", damping=decay, layers="*", rank="full"
    )
    found, random = up.lds(bank, result.frame()), up.lds(bank, rng.normal(size=(200, 10)))
    assert found.mean > 0.97
    assert random.low < 0 < random.high


def test_seeds_of_a_subset_are_averaged_in_any_order():
    bank, effect_NQ = linear(noise=10, seeds=1)
    many, _ = linear(noise=10, seeds=16)
    assert up.lds(many, effect_NQ).mean > up.lds(bank, effect_NQ).mean + 0.2
    order = np.random.default_rng(0).permutation(len(many.masks_MN))
    shuffled = up.Bank.of(many.masks_MN[order], many.values_MQ[order], many.seed_M[order])
    assert np.allclose(up.lds(shuffled, effect_NQ).each_Q, up.lds(many, effect_NQ).each_Q)


def test_a_quantile_over_seeds_is_not_moved_by_a_run_gone_astray():
    bank, effect_NQ = linear(noise=0.1, seeds=5)
    astray = bank.values_MQ.copy()
    astray[:100] += 1e4 * np.random.default_rng(0).normal(size=astray[:100].shape)  # all of the first seed
    broken = up.Bank.of(bank.masks_MN, astray, bank.seed_M)
    assert up.lds(broken, effect_NQ).mean < 0.3
    assert up.lds(broken, effect_NQ, quantile=0.5).mean > 0.99
    values = np.array([[0.0], [1], [5], [0], [2], [2], [9], [9], [9]])
    three = up.Bank.of(np.repeat(np.eye(3), 3, axis=0), values)
    assert up.lds(three, np.array([[3.0], [1], [9]]), quantile=0).mean == pytest.approx(0.75**0.5)  # 0, 0, 9


def test_ties_and_what_never_changes():
    bank = up.Bank.of(np.eye(4), np.array([[1.0, 3], [1, 3], [2, 3], [4, 3]]))
    found = up.lds(bank, np.array([[1.0, 1], [2, 2], [3, 3], [4, 4]]))
    assert found.each_Q[0] == pytest.approx(pd.Series([1, 1, 2, 4]).corr(pd.Series([1, 2, 3, 4]), "spearman"))
    assert found.each_Q[1] == 0


@pytest.mark.parametrize("form", ["npz", "parquet", "parquet of integers"])
def test_banks_of_others_are_read(form, tmp_path):
    bank, effect_NQ = linear(noise=1)
    if form == "npz":
        path = tmp_path / "theirs.npz"
        np.savez(path, masks=bank.masks_MN.astype(np.uint8), values=bank.values_MQ.astype(np.float32))
    else:
        path, masks = tmp_path / "theirs.parquet", bank.masks_MN
        masks = masks.astype(int) if "integers" in form else masks
        pq.write_table(pa.table({"masks": masks.tolist(), "values": bank.values_MQ.tolist()}), path)
    read = up.Bank.read(path)
    assert np.array_equal(read.masks_MN, bank.masks_MN)
    assert np.allclose(read.values_MQ, bank.values_MQ, atol=1e-5)
    assert up.lds(read, effect_NQ).mean == pytest.approx(up.lds(bank, effect_NQ).mean, abs=1e-3)


def test_a_bank_is_written_and_read_back_with_its_names(tmp_path):
    bank = up.Bank.of(np.eye(3), np.arange(6.0).reshape(3, 2), [4, 5, 6], ["first", "a longer name"])
    bank.write(tmp_path / "bank.parquet")
    read = up.Bank.read(tmp_path / "bank.parquet")
    assert read.queries == bank.queries
    assert read.seed_M.tolist() == [4, 5, 6]


def test_bad_banks_and_scores_are_refused(tmp_path):
    bank, effect_NQ = linear()
    np.savez(tmp_path / "other.npz", mask=bank.masks_MN)
    (tmp_path / "broken.parquet").write_text("none")
    frame = pd.DataFrame(effect_NQ, columns=pd.Index(bank.queries)).assign(sequence=np.arange(60))
    assert up.lds(bank, frame[::-1]).mean == pytest.approx(1)
    bad = [
        (lambda: up.Bank.read(tmp_path / "other.npz"), MismatchError, "is no bank"),
        (lambda: up.Bank.read(tmp_path / "broken.parquet"), StorageError, "cannot read the bank"),
        (lambda: up.Bank.of(np.eye(3), np.zeros((2, 1))), MismatchError, "do not belong together"),
        (lambda: up.Bank.of(2 * np.eye(3), np.zeros((3, 1))), MismatchError, "other values than 0 and 1"),
        (lambda: up.Bank.of(np.eye(3), np.full((3, 1), np.nan)), NumericalError, "model 0"),
        (lambda: up.Bank.of(np.eye(3), np.zeros((3, 1)), None, ["a", "b"]), MismatchError, "2 names"),
        (lambda: up.lds(bank, effect_NQ.T), MismatchError, r"\[60, 12\]"),
        (lambda: up.lds(bank, frame[1:]), MismatchError, "59 rows"),
        (lambda: up.lds(bank, frame.drop(columns="q3")), MismatchError, "'q3'"),
        (lambda: up.lds(bank, effect_NQ, quantile=2), ConfigError, "between 0 and 1"),
        (lambda: up.lds(up.Bank.of(np.eye(2), np.zeros((2, 1))), np.zeros((2, 1))), ConfigError, "at least three"),
    ]
    for work, kind, words in bad:
        with pytest.raises(kind, match=words):
            work()
