"""Norm statistics of a config's training episodes, in openpi's norm_stats.json format.

    python -m experiments.stats --config=pi0_aloha [--out=norm_stats.json] [--config.field=value ...]

Training computes them itself; this is for looking at them, and for a data set so large that once is enough.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments.flags import config, run
from openpi_port import normalize, transforms
from openpi_port.checkpoint import norm_stats_file
from openpi_port.data import dimensions
from openpi_port.data.datasets import open_datasets
from openpi_port.data.stats import compute
from openpi_port.whole import refuse_existing

OUT = flags.DEFINE_string("out", "norm_stats.json", "a file that isn't there yet, or a directory for norm_stats.json")


def main() -> int:
    """Computes, prints and saves; then the same check as before training, which may refuse the data."""
    train = config()
    paths = {name: destination(name) for name in train.datasets}
    for path in paths.values():
        refuse_existing(path)
    for name, data in train.datasets.items():
        dataset, _ = open_datasets(data, horizon=train.model.action_horizon)
        stats = compute(dataset, transforms.before_normalize(data, images=False))
        print(f"{data.repo_id}: {len(dataset.episodes)} training episodes, {len(dataset)} frames")
        for key, group in stats.items():
            names = dimensions.numbered(dataset, getattr(data, key), len(group.mean))
            width = max(len(key), *map(len, names))
            print(f"{key:{width}} {'mean':>10} {'std':>10} {'q01':>10} {'q99':>10} {'min':>10} {'max':>10}")
            for dim, row in zip(
                names, zip(group.mean, group.std, group.q01, group.q99, group.min, group.max, strict=True), strict=True
            ):
                print(f"{dim:{width}} " + " ".join(f"{value:10.4g}" for value in row))
        normalize.save_norm_stats(path := paths[name], stats)
        print(f"saved {path}; use it with --config.{f'mixture.{name}' if name else 'data'}.norm_stats={path}")
        if warning := normalize.before_training(stats, data.norm, data.repo_id):
            print(f"warning: {warning}")
    return 0


def destination(name: str) -> Path:
    """The file for a data set's statistics; those of `config.mixture` lie beside the first's, as in a checkpoint."""
    path = Path(OUT.value)
    if name:
        return (path.parent if path.suffix else path) / norm_stats_file(name)
    return path if path.suffix == ".json" else path / "norm_stats.json"


if __name__ == "__main__":
    run(main)
