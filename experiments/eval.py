"""How good a policy is: closed loop in simulation, or its chunks against a data set's.

    python -m experiments.eval --checkpoint=checkpoints/pi0_aloha_mini/300 --env=aloha_transfer_cube --episodes=50
    python -m experiments.eval --server=ws://gpu-box:8000 --env=aloha_transfer_cube
    python -m experiments.eval --expert --env=aloha_lift_cube --episodes=10
    python -m experiments.eval --checkpoint=... --env=dataset

Results, seeds, a grid video and a plot per episode go to --out. Ctrl-C reports the episodes that are finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from experiments import flags, open_loop, policy_flags
from openpi_port.errors import UserError, near
from openpi_port.serving.client import Client
from openpi_port.sim import aloha, gl, pictures, rollout, wilson

PREFIX, DATASET = "aloha_", "dataset"
ENVS = (*(PREFIX + task for task in aloha.TASKS), DATASET)

ENV = absl_flags.DEFINE_string("env", PREFIX + "transfer_cube", f"one of {', '.join(ENVS)}")
EPISODES = absl_flags.DEFINE_integer("episodes", 50, "seeds to play", 1)
SEED = absl_flags.DEFINE_integer("seed", 0, "the first seed; data were collected from 1000 on", 0)
SERVER = absl_flags.DEFINE_string("server", None, "ws://host:port of experiments.serve, instead of --checkpoint")
EXPERT = absl_flags.DEFINE_bool("expert", False, "the scripted expert plays, which checks the simulation")
REPLAN = absl_flags.DEFINE_integer("replan", 25, "actions played per chunk", 1)
MAX_STEPS = absl_flags.DEFINE_integer("max_steps", 400, "control steps (20 ms) per episode", 1)
WORKERS = absl_flags.DEFINE_integer("workers", None, "simulations at once; default: one per core, 16 at most", 1)
OUT = absl_flags.DEFINE_string("out", None, "directory of the results; default: eval/ENV/WHAT")
VIDEO = absl_flags.DEFINE_integer("video", 16, "episodes in the grid video; 0 for none", 0)
GIF = absl_flags.DEFINE_bool("gif", False, "also the video as a GIF")
PLOTS = absl_flags.DEFINE_integer("plots", 50, "episodes (or chunks, with --env=dataset) to plot", 0)
SAMPLES = absl_flags.DEFINE_integer("samples", 256, "with --env=dataset: validation frames to look at", 1)
FRAMES_EVERY = 2  # control steps per video frame


def main() -> None:
    """Plays and reports."""
    check()
    if ENV.value == DATASET:
        policy = policy_flags.policy()
        open_loop.evaluate(policy, directory("open_loop"), samples=SAMPLES.value, plots=PLOTS.value)
        return
    gl.require()
    workers = min(WORKERS.value or min(os.cpu_count() or 1, 16), EPISODES.value)
    with contextlib.ExitStack() as stack:
        act, noise_shape, about = driver(workers, stack)
        play(act, noise_shape, about, workers)


def check() -> None:
    """Refuses what can't be meant, before anything slow."""
    if ENV.value not in ENVS:
        raise UserError(f"--env={ENV.value}: no such environment; {near(ENV.value, ENVS)}")
    given = [bool(policy_flags.CHECKPOINT.value), bool(SERVER.value), EXPERT.value]
    if sum(given) != 1:
        raise UserError("give one of --checkpoint=DIR, --server=ws://host:port and --expert")
    if ENV.value == DATASET and not given[0]:
        raise UserError("--env=dataset compares a checkpoint with the data that it names: give --checkpoint=")


def driver(
    workers: int, stack: contextlib.ExitStack
) -> tuple[Callable[[Sequence[Mapping[str, Any]]], Any] | None, tuple[int, int] | None, dict[str, Any]]:
    """Who acts: a function of observations, the shape of its noise if it takes any, and its description."""
    if EXPERT.value:
        return None, None, {"expert": True}
    if SERVER.value:
        key = os.environ.get("OPENPI_PORT_API_KEY")
        clients = [stack.enter_context(Client(SERVER.value, api_key=key)) for _ in range(workers)]
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        about = clients[0].metadata
        shape = (about["action_horizon"], about["noise_dim"]) if about.get("noise_dim") else None
        return lambda o: list(pool.map(lambda c, x: c.infer(x), clients, o)), shape, {"server": SERVER.value, **about}
    policy = policy_flags.policy()
    if policy.horizon < REPLAN.value:
        raise UserError(f"--replan={REPLAN.value}, but the policy's chunks have {policy.horizon} actions")
    policy.warmup(range(1, workers + 1))
    return policy.infer_batch, policy.noise_shape, policy.metadata


def play(act: Any, noise_shape: tuple[int, int] | None, about: dict[str, Any], workers: int) -> None:
    """Plays all seeds, with a bar, and writes what came out."""
    seeds = range(SEED.value, SEED.value + EPISODES.value)
    setting = rollout.Setting(
        ENV.value.removeprefix(PREFIX),
        max_steps=MAX_STEPS.value,
        replan=REPLAN.value,
        prompt=policy_flags.PROMPT.value,
        films=VIDEO.value,
        frames_every=FRAMES_EVERY,
    )
    out = directory("expert" if EXPERT.value else "server")
    calls: list[tuple[int, float]] = []

    def timed(observations: Sequence[Mapping[str, Any]]) -> Any:
        begin = time.perf_counter()
        results = act(observations)
        calls.append((len(observations), time.perf_counter() - begin))
        return results

    episodes: list[rollout.Episode] = []
    begin = time.perf_counter()
    played = rollout.rollout(setting, seeds, act and timed, workers=workers, noise_shape=noise_shape)
    with tqdm(total=len(seeds), unit="episode", dynamic_ncols=True) as bar, contextlib.closing(played):
        try:
            for episode in played:
                episodes.append(episode)
                bar.update()
                bar.set_postfix_str(f"{sum(e.success for e in episodes)} of {len(episodes)} succeeded")
        except KeyboardInterrupt:
            bar.write("interrupted: reporting the episodes that are finished")
    if not episodes:
        raise UserError("no episode was finished: nothing to report")
    numbers = report(episodes, setting, about, time.perf_counter() - begin, calls)
    write(out, numbers, episodes)


def report(
    episodes: Sequence[rollout.Episode],
    setting: rollout.Setting,
    about: Mapping[str, Any],
    seconds: float,
    calls: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    """All numbers, ready for JSON; prints the main ones."""
    successes, count = sum(e.success for e in episodes), len(episodes)
    low, high = wilson.interval(successes, count)
    steps = sum(len(e.rewards) for e in episodes)
    infer_ms = [1e3 * s for _, s in calls]
    sim_ms = 1e3 * sum(e.sim_seconds for e in episodes) / steps
    held = sum(e.held for e in episodes)
    print(
        f"{successes} of {count} episodes succeeded: {successes / count:.0%} (95% interval {low:.1%} to {high:.1%}); "
        f"{held} still did {setting.after} steps later\n"
        f"{1e3 * seconds / steps:.1f} ms a control step over all; simulation {sim_ms:.1f} ms in its process"
        + (f"; inference {np.median(infer_ms):.1f} ms a chunk (median of {len(calls)} calls)" if calls else "")
    )
    return {
        "env": ENV.value,
        "policy": dict(about),
        "prompt": setting.prompt or aloha.TASKS[setting.task].instruction,
        "replan": setting.replan,
        "max_steps": setting.max_steps,
        "after_success": setting.after,
        "episodes": count,
        "successes": successes,
        "held": held,
        "success_rate": successes / count,
        "confidence_95": [low, high],
        "wall_s": seconds,
        "steps": steps,
        "ms_per_step": 1e3 * seconds / steps,
        "sim_ms_per_step": sim_ms,
        "infer_ms": {"median": float(np.median(infer_ms)), "max": max(infer_ms)} if calls else None,
        "mean_batch": float(np.mean([n for n, _ in calls])) if calls else None,
        "results": [
            {
                "seed": e.seed,
                "success": e.success,
                "held": e.held,
                "diverged": e.diverged,
                "steps": len(e.rewards),
                "best_reward": int(e.rewards.max()),
            }
            for e in episodes
        ],
    }


def write(out: Path, numbers: Mapping[str, Any], episodes: Sequence[rollout.Episode]) -> None:
    """results.json, the grid and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    shown = [e for e in episodes if e.frames is not None]
    fps = aloha.FPS // FRAMES_EVERY
    if shown:
        pictures.write_mp4(out / "grid.mp4", pictures.grid(shown), fps)
    if shown and GIF.value:
        pictures.write_gif(out / "grid.gif", pictures.grid(shown), fps)
    for episode in episodes[: PLOTS.value]:
        pictures.plot_episode(out / "episodes" / f"seed_{episode.seed:04d}.png", episode, 1 / aloha.FPS)
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def directory(name: str) -> Path:
    """Where the results go."""
    if OUT.value:
        return Path(OUT.value)
    if source := policy_flags.CHECKPOINT.value:
        name = "_".join(Path(source).parts[-2:])
    return Path("eval") / ENV.value / name


if __name__ == "__main__":
    flags.run(main)
