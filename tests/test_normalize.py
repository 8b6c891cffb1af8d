"""Statistics, normalisation and openpi's norm_stats.json."""

from __future__ import annotations

import json

import commands
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from openpi_port import normalize as n
from openpi_port.errors import UserError


@pytest.fixture(scope="module")
def io(golden):
    return dict(np.load(golden / "openpi/io/io.npz"))


def stats_of(io):
    return n.Stats(*(io[f"norm/{f}"] for f in ("mean", "std", "q01", "q99")))


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
def test_golden_normalisation(io, mode):
    stats, x = stats_of(io), io["norm/x"]
    y = n.normalize(x, stats, mode)
    np.testing.assert_array_equal(y, io[f"norm/{mode}"])
    np.testing.assert_allclose(n.unnormalize(y, stats, mode), io[f"norm/un_{mode}"][:, :14], rtol=0, atol=1e-12)


def test_golden_running_statistics(io):
    """openpi's quantiles are read off a histogram of 5,000 bins, so they are off by up to a bin or two."""
    x = io["stats/stream"]
    run = n.RunningStats(x.shape[1])
    for part in np.array_split(x, 7):
        run.update(part)
    s = run.finish()
    np.testing.assert_allclose(s.mean, io["stats/mean"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(s.std, io["stats/std"], rtol=1e-7)
    np.testing.assert_array_equal([s.q01, s.q99], np.quantile(x, [0.01, 0.99], axis=0))
    # Between two of the 301 rows a histogram may answer anything: compare ranks, then values to the bin.
    for got, q in ((io["stats/q01"], 0.01), (io["stats/q99"], 0.99)):
        rank = (x < got).mean(axis=0)
        assert np.abs(rank - q).max() < 2 / len(x)
    step = (s.max - s.min) / 5000
    ordered = np.sort(x, axis=0)
    for name, low, high in (("q01", ordered[2], ordered[4]), ("q99", ordered[-5], ordered[-3])):
        assert (io[f"stats/{name}"] >= low - 2 * step).all()
        assert (io[f"stats/{name}"] <= high + 2 * step).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 400),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    offset=st.sampled_from([0.0, 1e5]),
    seed=st.integers(0, 2**31),
)
def test_streaming_and_merging_are_exact_while_small(rows, cuts, offset, seed):
    x = np.random.default_rng(seed).normal(size=(rows, 3)) * [1, 10, 1e-3] + offset
    whole = n.RunningStats(3, block=256)
    for part in np.split(x, sorted(int(c * rows) for c in cuts)):
        one = n.RunningStats(3, block=256)
        one.update(part)
        whole = whole.merge(one)
    s = whole.finish()
    assert s.count == rows and whole.rank_error == 0
    np.testing.assert_allclose(s.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(s.std, x.std(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal([s.min, s.max], [x.min(0), x.max(0)])
    np.testing.assert_allclose([s.q01, s.q99], np.quantile(x, [0.01, 0.99], axis=0), rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(300, 20000),
    parts=st.integers(1, 6),
    order=st.sampled_from(["random", "rising"]),
    seed=st.integers(0, 2**31),
)
def test_the_sketch_keeps_its_bound(rows, parts, order, seed):
    x = np.random.default_rng(seed).standard_cauchy(size=(rows, 2))
    x = np.sort(x, axis=0) if order == "rising" else x
    whole = n.RunningStats(2, block=64)
    for part in np.array_split(x, parts):
        one = n.RunningStats(2, block=64)
        for piece in np.array_split(part, 5):
            one.update(piece)
        whole = whole.merge(one)
    assert sum(len(a) * 2**h for h, level in enumerate(whole._levels) for a in level) == rows
    assert whole.rank_error <= 1.5 * (np.log2(rows / 64) + 2) / (4 * 64)
    values = np.concatenate([a for level in whole._levels for a in level])
    weights = np.concatenate([np.full(len(a), 2**h) for h, level in enumerate(whole._levels) for a in level])
    for at in np.quantile(x, [0.01, 0.3, 0.5, 0.9, 0.99], axis=0):
        off = ((values <= at) * weights[:, None]).sum(0) - (x <= at).sum(0)
        assert (np.abs(off) <= whole.rank_error * rows + 1e-6).all()
    for q in (0.01, 0.5, 0.99):
        got = whole.quantiles([q])[0]
        low, high = (x < got).mean(0), (x <= got).mean(0)
        heaviest = 2 ** (len(whole._levels) - 1)  # a quantile cannot fall inside a value's own rows
        slack = whole.rank_error + 2 * heaviest / rows
        assert (low <= q + slack).all() and (high >= q - slack).all()


def test_values_that_are_not_finite_or_of_another_size_are_named():
    run = n.RunningStats(3)
    with pytest.raises(UserError, match="dimension 1 "):
        run.update(np.array([[0, np.nan, 0]]))
    with pytest.raises(UserError, match="3 dimensions"):
        run.update(np.zeros((2, 4)))
    with pytest.raises(UserError, match="empty"):
        run.finish()


@settings(max_examples=50, deadline=None)
@given(
    dim=st.integers(1, 8),
    extra=st.integers(0, 3),
    mode=st.sampled_from(["zscore", "quantile"]),
    seed=st.integers(0, 9999),
)
def test_unnormalise_inverts(dim, extra, mode, seed):
    rng = np.random.default_rng(seed)
    mean, low = rng.normal(size=(2, dim + extra))
    std, spread = rng.uniform(0, 2, size=(2, dim + extra))
    stats = n.Stats(mean, std, low, low + spread)
    x = rng.normal(size=(5, dim))
    np.testing.assert_allclose(n.unnormalize(n.normalize(x, stats, mode), stats, mode), x, rtol=1e-9, atol=1e-9)
    y = n.normalize(x.astype(np.float32), stats, mode)
    assert y.dtype == np.float32


def test_statistics_shorter_than_the_values_or_without_quantiles_are_refused():
    stats = n.Stats(np.zeros(3), np.ones(3))
    with pytest.raises(UserError, match="3 dimensions, the values 4"):
        n.normalize(np.zeros(4), stats, "zscore")
    with pytest.raises(UserError, match="q01"):
        n.normalize(np.zeros(3), stats, "quantile")


@pytest.mark.parametrize("name", ["pi0", "pi05", "pi0_fast"])
def test_openpi_file_round_trips(golden, tmp_path, name):
    path = golden / f"openpi/{name}/assets/golden_robot/norm_stats.json"
    n.save_norm_stats(tmp_path, n.load_norm_stats(path.parent))
    written = json.loads((tmp_path / "norm_stats.json").read_text())
    assert written == json.loads(path.read_text())
    assert list(written["norm_stats"]["state"]) == ["mean", "std", "q01", "q99"]
    assert [p.name for p in tmp_path.iterdir()] == ["norm_stats.json"]


def test_published_files(shared):
    folder = shared / "data/norm_stats"
    for name in ("bridge_norm_stats.json", "pi05_libero_norm_stats.json"):
        stats = n.load_norm_stats(folder / name)
        assert len(stats["state"].mean) == 8 and len(stats["actions"].mean) == 7
    constant = n.tiny_ranges(n.load_norm_stats(folder / "bridge_norm_stats.json"), "quantile")
    assert ("state", 6) in {(f.key, f.dim) for f in constant}
    with pytest.raises(UserError, match=r"salmonn_bridge.*no key norm_stats/state; it has bridge_robot"):
        n.load_norm_stats(folder / "salmonn_bridge_norm_stats.json")
    assert len(n.load_norm_stats(folder / "salmonn_bridge_norm_stats.json", need=("bridge_robot",))) == 1


GOOD = {"mean": [0, 1], "std": [1, 1], "q01": [-1, -1], "q99": [1, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["norm_stats"].pop("actions"), "norm_stats/actions"),
        (lambda t: t.update(stats=t.pop("norm_stats")), "no top key 'norm_stats'"),
        (lambda t: t["norm_stats"]["state"].pop("std"), "norm_stats/state/std: missing"),
        (lambda t: t["norm_stats"]["state"].pop("q99"), "only one of q01 and q99"),
        (lambda t: t["norm_stats"]["state"].update(std=[1, 1, 1]), "state/std: 3 numbers, but mean has 2"),
        (lambda t: t["norm_stats"]["state"].update(mean=[0, float("nan")]), r"state/mean\[1\]: not a finite"),
        (lambda t: t["norm_stats"]["state"].update(std=[1, -1]), r"state/std\[1\]: negative"),
        (lambda t: t["norm_stats"]["state"].update(q99=[1, -2]), r"state/q99\[1\]: below"),
        (lambda t: t["norm_stats"]["state"].update(mean=[[0, 1]]), "flat list"),
        (lambda t: t["norm_stats"]["state"].update(mean=["a", "b"]), "list of numbers"),
        (lambda t: t["norm_stats"].update(state=[1]), "norm_stats/state: expected an object"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, change, message):
    tree = json.loads(json.dumps({"norm_stats": {"state": GOOD, "actions": GOOD}}))
    change(tree)
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message) as error:
        n.load_norm_stats(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="norm_stats.json: cannot be read"):
        n.load_norm_stats(tmp_path)
    (tmp_path / "norm_stats.json").write_text('{"norm_stats": {')
    with pytest.raises(UserError, match="no valid JSON"):
        n.load_norm_stats(tmp_path)


def test_files_without_quantiles_load(tmp_path):
    bare = {"mean": [0, 1], "std": [1, 1]}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": bare, "actions": bare}}))
    stats = n.load_norm_stats(tmp_path)
    assert stats["state"].q01 is None
    n.save_norm_stats(tmp_path, stats)
    assert n.load_norm_stats(tmp_path)["actions"].q99 is None


def test_tiny_ranges_warn_and_exploding_values_refuse():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    x[:, 1] = 0.25
    run = n.RunningStats(3)
    run.update(x)
    stats = {"state": run.finish()}
    assert [(f.key, f.dim, f.spread) for f in n.tiny_ranges(stats)] == [("state", 1, 0.0)]
    assert "state[1] is constant" in n.before_training(stats, "zscore", "some/data")
    assert n.before_training({"state": n.Stats(np.zeros(2), np.ones(2))}, "zscore", "some/data") is None

    x[:10, 1] = 1.25  # a gripper that closes in 0.5 % of the frames: q99 == q01, and z-scores stay below 15
    run = n.RunningStats(3)
    run.update(x)
    stats = {"state": run.finish()}
    assert n.before_training(stats, "zscore", "some/data") is None
    with pytest.raises(UserError, match=r"some/data: state\[1\] spreads 0, and normalised reaches 2e\+06.*norm=zscore"):
        n.before_training(stats, "quantile", "some/data")


def test_the_command(tmp_path):
    out = tmp_path / "stats" / "mine.json"
    arguments = ["--config=pi0_aloha:debug", "--config.data.episodes=(2,5)", "--config.data.validation=0.0"]
    done = commands.run("experiments.stats", *arguments, f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "2 training episodes" in done.stdout and "6 left_arm_gripper" in done.stdout
    before = out.read_bytes()
    assert set(n.load_norm_stats(out)) == {"state", "actions"}
    again = commands.run("experiments.stats", *arguments, f"--out={out}")
    assert again.returncode == 2 and "mine.json exists already and is not overwritten" in again.stderr
    assert out.read_bytes() == before
