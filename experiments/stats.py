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
from openpi_port.data.datasets import open_datasets
from openpi_port.data.stats import compute

OUT = flags.DEFINE_string("out", "norm_stats.json", "where to: a file, or a directory for norm_stats.json")


def main() -> int:
    """Computes, prints and saves; then the same check as before training, which may refuse the data."""
    train = config()
    for name, data in train.datasets.items():
        dataset, _ = open_datasets(data, horizon=train.model.action_horizon)
        stats = compute(dataset, transforms.before_normalize(data, images=False))
        print(f"{data.repo_id}: {len(dataset.episodes)} training episodes, {len(dataset)} frames")
        for key, group in stats.items():
            print(f"{key:8} {'mean':>10} {'std':>10} {'q01':>10} {'q99':>10} {'min':>10} {'max':>10}")
            for dim, row in enumerate(
                zip(group.mean, group.std, group.q01, group.q99, group.min, group.max, strict=True)
            ):
                print(f"{dim:8} " + " ".join(f"{value:10.4g}" for value in row))
        path = Path(OUT.value)
        if name:  # as in a checkpoint
            path = (path.parent if path.suffix else path) / norm_stats_file(name)
        normalize.save_norm_stats(path, stats)
        print(f"saved {path}; use it with --config.{f'mixture.{name}' if name else 'data'}.norm_stats={path}")
        if warning := normalize.before_training(stats, data.norm, data.repo_id):
            print(f"warning: {warning}")
    return 0


if __name__ == "__main__":
    run(main)
