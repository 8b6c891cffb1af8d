"""A policy's chunks against the recorded ones, on the episodes that training left out.

Axis letters: A actions in a chunk, D action dimensions.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from openpi_port import Policy, whole
from openpi_port.check_sample import split_keys
from openpi_port.data import dimensions
from openpi_port.data.datasets import open_datasets
from openpi_port.errors import UserError
from openpi_port.rng import draw_noise
from openpi_port.sim import pictures

BATCH = 8


def evaluate(policy: Policy, out: Path, *, samples: int, plots: int) -> None:
    """Prints and writes the error per dimension, in robot units, and plots some chunks.

    Args:
      policy: whose `data` names the data set.
      out: directory.
      samples: frames, spread evenly over the validation episodes.
      plots: chunks to plot, spread likewise.

    Raises:
      UserError: the checkpoint names no data set, or it has no validation episodes.
    """
    data = policy.data
    if not data.repo_id:
        raise UserError("the checkpoint names no data set; open-loop evaluation needs the one that it was trained on")
    config = policy.model.config
    try:
        _, dataset = open_datasets(data, horizon=policy.horizon, image_size=config.vision.image_size)
    except UserError as error:
        raise UserError(f'{error}; --data=\'{{"repo_id": "DIR"}}\' names another data set') from error
    if dataset is None:
        raise UserError(f"{data.repo_id}: no validation episodes (data.validation={data.validation:g})")
    count = min(samples, len(dataset))
    rows = [i * len(dataset) // count for i in range(count)]
    shown = {rows[i * count // plots] for i in range(min(plots, count))} if plots else set()
    names = dimensions.numbered(dataset, data.actions, policy.metadata["action_dim"])
    errors, recorded = [], []
    out.mkdir(parents=True, exist_ok=True)
    policy.warmup((BATCH,))
    for start in tqdm(range(0, count, BATCH), unit="batch", dynamic_ncols=True):
        part = rows[start : start + BATCH]
        raw = [dataset[row] for row in part]
        noise = policy.noise_shape and np.stack([draw_noise(0, row, policy.noise_shape) for row in part])
        results = policy.infer_batch(raw, noise)
        for row, sample, result in zip(part, raw, results, strict=True):
            true = np.concatenate([np.asarray(sample[k], np.float32) for k in split_keys(data.actions)], axis=-1)
            true = np.where(sample["action_is_pad"][:, None], np.nan, true)
            errors.append(result["actions"] - true)
            recorded.append(true)
            if row in shown:
                title = f"episode {sample['episode_index']}, frame {sample['frame_index']}"
                pictures.plot_chunk(out / "chunks" / f"{row:06d}.png", result["actions"], true, title, names)
    report(np.stack(errors), np.stack(recorded), out, data.repo_id, names)


def report(errors: np.ndarray, recorded: np.ndarray, out: Path, name: str, dims: list[str]) -> None:
    """Mean absolute and root mean square error per dimension, beside the spread of what was recorded.

    Whoever always gave the recorded actions' mean would have their spread as root mean square error.

    Args:
      errors: [samples, A, D], robot units; NaN past an episode's end.
      recorded: [samples, A, D], likewise.
      out: where open_loop.json goes.
      name: of the data set.
      dims: names of the dimensions.
    """
    mae = np.nanmean(np.abs(errors), axis=(0, 1))
    rmse = np.sqrt(np.nanmean(errors**2, axis=(0, 1)))
    spread = np.nanstd(recorded, axis=(0, 1))
    there = ~np.isnan(errors).all(axis=(0, 2))  # a chunk may be longer than every episode
    by_step = np.nanmean(np.abs(errors[:, there]), axis=(0, 2))
    width = max(map(len, ("dimension", *dims)))
    print(f"{name}: error of {len(errors)} validation chunks in robot units, and how far the recorded actions spread")
    print(f"{'dimension':{width}} {'mean abs':>10} {'rms':>10} {'spread':>10}")
    for dim, *row in zip(dims, mae, rmse, spread, strict=True):
        print(f"{dim:{width}} " + " ".join(f"{value:10.4g}" for value in row))
    square = [np.sqrt((values**2).mean()) for values in (rmse, spread)]
    print(f"{'all':{width}} {mae.mean():10.4g} {square[0]:10.4g} {square[1]:10.4g}")
    numbers = {"dataset": name, "dimensions": dims, "samples": len(errors), "mae": mae.tolist(), "rmse": rmse.tolist()}
    numbers["spread"] = spread.tolist()
    numbers["mae_by_step"] = by_step.tolist()
    whole.write_text(out / "open_loop.json", json.dumps(numbers, indent=1) + "\n")
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
