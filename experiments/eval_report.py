"""What a closed-loop evaluation leaves behind: numbers, a grid video, plots, trajectories, a table of instructions."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi_port import whole
from openpi_port.sim import latency, pictures, rollout, simulation, wilson

RESULTS, TRAJECTORIES = "results.json", "trajectories"


def numbers(
    episodes: Sequence[rollout.Episode],
    setting: rollout.Setting,
    about: Mapping[str, Any],
    seconds: float,
    calls: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    """All numbers, ready for JSON.

    Args:
      episodes: at least one.
      setting: how they were played.
      about: who played.
      seconds: that it took in all.
      calls: of the policy: how many observations, and seconds.
    """
    task = simulation.about(setting.task)
    successes, count = sum(e.success for e in episodes), len(episodes)
    steps = sum(len(e.rewards) for e in episodes)
    infer_ms = [1e3 * s for _, s in calls]
    kinks = [latency.kinks(e.actions, list(e.borders), task.arms) for e in episodes if task.arms]
    at, elsewhere = (np.concatenate(part) for part in zip(*kinks, strict=True)) if kinks else ((), ())
    return {
        "task": setting.task,
        "env": setting.task if setting.task.startswith("libero") else f"aloha_{setting.task}",
        "policy": dict(about),
        "prompt": setting.prompt or task.instruction,
        "replan": setting.replan,
        "chunks": setting.chunks,
        "latency_steps": setting.latency,
        "kinks_rad": {"at_borders": float(at.mean()), "elsewhere": float(elsewhere.mean())} if len(at) else None,
        "borders": len(at),
        "max_steps": setting.max_steps,
        "after_success": setting.after,
        "episodes": count,
        "successes": successes,
        "held": sum(e.end == setting.task for e in episodes),
        "success_rate": successes / count,
        "confidence_95": list(wilson.interval(successes, count)),
        "wall_s": seconds,
        "steps": steps,
        "ms_per_step": 1e3 * seconds / steps,
        "sim_ms_per_step": 1e3 * sum(e.sim_seconds for e in episodes) / steps,
        "infer_ms": {"median": float(np.median(infer_ms)), "max": max(infer_ms)} if calls else None,
        "calls": len(calls),
        "mean_batch": float(np.mean([n for n, _ in calls])) if calls else None,
        "results": [
            {
                "seed": e.seed,
                "success": e.success,
                "end": e.end,
                "diverged": e.diverged,
                "steps": len(e.rewards),
                "best_reward": int(e.rewards.max()),
            }
            for e in episodes
        ],
    }


def summary(numbers: Mapping[str, Any]) -> str:
    """The main ones of `numbers`, in words."""
    successes, count, (low, high) = numbers["successes"], numbers["episodes"], numbers["confidence_95"]
    lines = [
        f"{successes} of {count} episodes succeeded: {successes / count:.0%} (95% interval {low:.1%} to {high:.1%}); "
        f"{numbers['held']} still did at the end",
        f"{numbers['ms_per_step']:.1f} ms a control step over all; "
        f"simulation {numbers['sim_ms_per_step']:.1f} ms in its process",
    ]
    if numbers["infer_ms"] is not None:
        median, calls = numbers["infer_ms"]["median"], numbers["calls"]
        lines[-1] += f"; inference {median:.1f} ms a chunk (median of {calls} calls)"
    if (kinks := numbers["kinks_rad"]) is not None:
        lines.append(
            f"the step of the joints' targets changes by {1e3 * kinks['at_borders']:.1f} mrad where chunks meet "
            f"(mean of {numbers['borders']}), by {1e3 * kinks['elsewhere']:.1f} elsewhere"
        )
    return "\n".join(lines)


def write(
    out: Path,
    results: Mapping[str, Any],
    episodes: Sequence[rollout.Episode],
    *,
    plots: int,
    gif: bool,
    trajectories: bool,
) -> None:
    """results.json, the video, plots of the first episodes, and every trajectory where that is wanted."""
    out.mkdir(parents=True, exist_ok=True)
    whole.write_text(out / RESULTS, json.dumps(results, indent=1) + "\n")
    task = simulation.about(results["task"])
    _write_video(out, pictures.rows([e for e in episodes if e.frames is not None]), [], task.fps, gif)
    for episode in episodes[:plots]:
        path = out / "episodes" / f"seed_{episode.seed:04d}.png"
        pictures.plot_episode(path, episode, task)
    if trajectories:
        (out / TRAJECTORIES).mkdir(exist_ok=True)
    for episode in episodes if trajectories else ():
        arrays = {name: getattr(episode, name) for name in ("states", "actions", "rewards")}
        np.savez_compressed(out / TRAJECTORIES / f"seed_{episode.seed:04d}.npz", **arrays)


def instructions(played: Mapping[str, Sequence[rollout.Episode]], out: Path, *, gif: bool) -> None:
    """Prints and writes what came of each instruction; an episode is right if its own task is fulfilled at the end.

    Args:
      played: task -> its episodes, the same seeds for all.
      out: directory.
      gif: also the video as a GIF.
    """
    told = {task: simulation.about(task).instruction for task in played}
    counts = {task: Counter(e.end for e in episodes) for task, episodes in played.items()}
    rows = {}
    width = max(map(len, told.values())) + 2
    print(
        f"\n{'instruction':{width}}" + "".join(f"{task:>16}" for task in (*played, "neither")) + "   right at the end"
    )
    for task, count in counts.items():
        total = sum(count.values())
        low, high = wilson.interval(count[task], total)
        rows[task] = {
            "instruction": told[task],
            "episodes": total,
            "ends": {end or "neither": n for end, n in count.items()},
            "right": count[task],
            "confidence_95": [low, high],
        }
        cells = "".join(f"{count[end]:16}" for end in (*played, None))
        print(
            f"{rows[task]['instruction']:{width}}{cells}   {count[task]} of {total}: {count[task] / total:.0%} "
            f"({low:.1%} to {high:.1%})"
        )
    by_seed = [{e.seed: e.end for e in episodes} for episodes in played.values()]
    seeds = set.intersection(*map(set, by_seed))
    both = sum(all(ends[seed] == task for task, ends in zip(played, by_seed, strict=True)) for seed in seeds)
    low, high = wilson.interval(both, len(seeds))
    print(f"the instruction alone decided on {both} of {len(seeds)} seeds ({low:.1%} to {high:.1%})")
    about = {"tasks": rows, "seeds": len(seeds), "decided": both}
    whole.write_text(out / "instructions.json", json.dumps(about, indent=1) + "\n")
    shown = [  # with borders that say whether the episode was right
        [dataclasses.replace(e, success=e.end == task) for e in episodes if e.frames is not None][:5]
        for task, episodes in played.items()
    ]
    _write_video(out, shown, list(told.values()), simulation.about(next(iter(played))).fps, gif)


def _write_video(
    out: Path, shown: Sequence[Sequence[rollout.Episode]], titles: Sequence[str], fps: int, gif: bool
) -> None:
    """grid.mp4, and grid.gif; none without frames."""
    if not any(shown):
        return
    fps //= pictures.FRAMES_EVERY
    pictures.write_mp4(out / "grid.mp4", pictures.grid(shown, titles), fps)
    if gif:
        pictures.write_gif(out / "grid.gif", pictures.grid(shown, titles), fps)
