"""How good a policy is: closed loop in simulation, or its chunks against a data set's.

    python -m experiments.eval --checkpoint=checkpoints/pi0_aloha_mini/300 --env=aloha_transfer_cube --episodes=50
    python -m experiments.eval --server=ws://gpu-box:8000 --env=aloha_transfer_cube
    python -m experiments.eval --expert --env=aloha_lift_cube --episodes=10
    python -m experiments.eval --checkpoint=... --env=aloha_instructions
    python -m experiments.eval --server=ws://gpu-box:8000 --env=libero_spatial_0    (docs/libero.md)
    python -m experiments.eval --checkpoint=... --env=dataset

`aloha_instructions` plays every seed once per task, in the same scene but with that task's instruction, to the end, and
counts what came of it: whether the instruction alone decides.
Results, seeds, a grid video and a plot per episode go to --out, which may hold no others. Ctrl-C or SIGTERM reports the
episodes that are finished.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags
from tqdm import tqdm

from experiments import eval_report, flags, policy_flags
from openpi_port.errors import UserError, near
from openpi_port.serving.client import Client
from openpi_port.sim import gl, latency, pictures, rollout, simulation
from openpi_port.whole import free, refuse_existing

INSTRUCTIONS, DATASET = "aloha_instructions", "dataset"
# Environments and their tasks; LIBERO's are many, and their package need not be here to name ALOHA's.
ALOHA = {"aloha_transfer_cube": "transfer_cube", "aloha_lift_cube": "lift_cube"}
ENVS = (*ALOHA, INSTRUCTIONS, DATASET)

ENV = absl_flags.DEFINE_string("env", "aloha_transfer_cube", f"{', '.join(ENVS)} or libero_SUITE_NUMBER")
EPISODES = absl_flags.DEFINE_integer("episodes", 50, "seeds to play", 1)
SEED = absl_flags.DEFINE_integer("seed", 0, "the first seed; data were collected from 1000 on", 0)
SERVER = absl_flags.DEFINE_string("server", None, "ws://host:port of experiments.serve, instead of --checkpoint")
EXPERT = absl_flags.DEFINE_bool("expert", False, "the scripted expert plays, which checks the simulation")
REPLAN = absl_flags.DEFINE_integer("replan", None, "actions played per chunk; default: ALOHA 25, LIBERO 5", 1)
CHUNKS = absl_flags.DEFINE_enum("chunks", "open_loop", latency.STYLES, "how chunks follow one another")
LATENCY = absl_flags.DEFINE_float("latency", 0.0, "s from an observation to its chunk, injected (docs/real_time.md)", 0)
MAX_STEPS = absl_flags.DEFINE_integer(
    "max_steps", None, "control steps per episode; default: ALOHA 400, or LIBERO's", 1
)
WORKERS = absl_flags.DEFINE_integer("workers", None, "simulations at once; default: one per core, 16 at most", 1)
OUT = absl_flags.DEFINE_string("out", None, "directory of the results, empty or new; default: eval/ENV/WHAT, or WHAT_2")
VIDEO = absl_flags.DEFINE_integer("video", 16, "episodes in the grid video; 0 for none", 0)
GIF = absl_flags.DEFINE_bool("gif", False, "also the video as a GIF")
PLOTS = absl_flags.DEFINE_integer("plots", 50, "episodes (or chunks, with --env=dataset) to plot", 0)
TRAJECTORIES = absl_flags.DEFINE_bool("trajectories", False, "also every episode's numbers, for experiments.compare")
SAMPLES = absl_flags.DEFINE_integer("samples", 256, "with --env=dataset: validation frames to look at", 1)


class Driver(NamedTuple):
    """Who acts: a function of observations (None: the expert), the shape of its noise if any, and what it is."""

    act: rollout.Act | None
    noise_shape: tuple[int, int] | None
    about: Mapping[str, Any]


def main() -> None:
    """Plays and reports."""
    check()
    if ENV.value == DATASET:
        from experiments import open_loop  # needs packages that LIBERO's environment lacks

        out = directory("open_loop")
        open_loop.evaluate(policy_flags.policy(), out, samples=SAMPLES.value, plots=PLOTS.value)
        return
    gl.require()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit is no reason to report nothing
    out = directory("expert" if EXPERT.value else "server")
    workers = min(WORKERS.value or min(os.cpu_count() or 1, 16), EPISODES.value)
    whole = ENV.value == INSTRUCTIONS  # what an instruction led to shows at the end
    settings = [setting(task, whole=whole) for task in (ALOHA.values() if whole else [task_of(ENV.value)])]
    with contextlib.ExitStack() as stack:
        who = driver(workers, settings[0], stack)
        out.mkdir(parents=True, exist_ok=True)  # now, not when all is played
        played: dict[str, list[rollout.Episode]] = {}
        for how in settings:
            played[how.task], interrupted = play(who, how, out / how.task if whole else out, workers)
            if interrupted:
                break
    if whole and len(played) == len(settings):
        eval_report.instructions(played, out, gif=GIF.value)
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def check() -> None:
    """Refuses what can't be meant, before anything slow."""
    if ENV.value not in ENVS and not ENV.value.startswith("libero"):
        raise UserError(f"--env={ENV.value}: no such environment; {near(ENV.value, ENVS)}")
    given = [bool(policy_flags.CHECKPOINT.value), bool(SERVER.value), EXPERT.value]
    if sum(given) != 1:
        raise UserError("give one of --checkpoint=DIR, --server=ws://host:port and --expert")
    if ENV.value == DATASET and not given[0]:
        raise UserError("--env=dataset compares a checkpoint with the data that it names: give --checkpoint=")
    if ENV.value == INSTRUCTIONS and policy_flags.PROMPT.value is not None:
        raise UserError(f"--env={INSTRUCTIONS} gives each task's own instruction: leave --prompt out")


def task_of(env: str) -> str:
    """What the simulation calls an environment."""
    return ALOHA.get(env, env)


def driver(workers: int, how: rollout.Setting, stack: contextlib.ExitStack) -> Driver:
    """Opens what the command line names; what has to be closed goes onto the stack."""
    if EXPERT.value:
        return Driver(None, None, {"expert": True})
    if SERVER.value:
        print(f"connecting to {SERVER.value}", flush=True)  # which may take a minute to be there
        key = os.environ.get("OPENPI_PORT_API_KEY")
        clients = [stack.enter_context(Client(SERVER.value, api_key=key)) for _ in range(workers)]
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        about = clients[0].metadata
        shape = (about["action_horizon"], about["noise_dim"]) if about.get("noise_dim") else None
        act = lambda o: list(pool.map(lambda c, x: c.infer(x), clients, o))  # noqa: E731
        return Driver(act, shape, {"server": SERVER.value, **about})
    policy = policy_flags.policy()
    if policy.horizon < how.replan:
        raise UserError(f"--replan={how.replan}, but the policy's chunks have {policy.horizon} actions")
    policy.warmup(range(1, workers + 1), realtime=CHUNKS.value == "realtime")
    return Driver(policy.infer_batch, policy.noise_shape, policy.metadata)


def setting(task: str, *, whole: bool = False) -> rollout.Setting:
    """How the command line says to play a task, else its usual values; `whole` plays every episode to its end."""
    usual = simulation.about(task)
    max_steps = MAX_STEPS.value or usual.max_steps
    films = min(VIDEO.value, EPISODES.value)
    return rollout.Setting(
        task,
        max_steps=max_steps,
        after=None if whole else usual.after,
        replan=REPLAN.value or usual.replan,
        chunks=CHUNKS.value,
        latency=math.ceil(round(LATENCY.value * usual.fps, 6)),
        prompt=policy_flags.PROMPT.value,
        films=films,
        frames_every=pictures.FRAMES_EVERY,
        frame_size=min(224, 480 // math.ceil(math.sqrt(max(films, 1))) // 2 * 2),
    )


def play(who: Driver, how: rollout.Setting, out: Path, workers: int) -> tuple[list[rollout.Episode], bool]:
    """Plays all seeds, with a bar, and writes what came out; tells whether it was interrupted."""
    seeds = range(SEED.value, SEED.value + EPISODES.value)
    calls: list[tuple[int, float]] = []

    def timed(observations: Sequence[Mapping[str, Any]]) -> Any:
        begin = time.perf_counter()
        results = who.act(observations)
        calls.append((len(observations), time.perf_counter() - begin))
        return results

    episodes: list[rollout.Episode] = []
    interrupted = False
    begin = time.perf_counter()
    played = rollout.rollout(how, seeds, who.act and timed, workers=workers, noise_shape=who.noise_shape)
    with tqdm(total=len(seeds), unit="episode", dynamic_ncols=True) as bar, contextlib.closing(played):
        try:
            for episode in played:
                episodes.append(episode)
                bar.set_postfix_str(f"{sum(e.success for e in episodes)} of {len(episodes)} succeeded", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
            bar.write("interrupted: reporting the episodes that are finished")
    if not episodes:
        raise UserError("no episode was finished: nothing to report")
    numbers = eval_report.numbers(episodes, how, who.about, time.perf_counter() - begin, calls)
    print(eval_report.summary(numbers))
    eval_report.write(out, numbers, episodes, plots=PLOTS.value, gif=GIF.value, trajectories=TRAJECTORIES.value)
    return episodes, interrupted


def directory(name: str) -> Path:
    """Where the results go: hours of them may have gone there before, and stay."""
    if OUT.value:
        out = Path(OUT.value)
        if not out.is_dir() or any(out.iterdir()):
            refuse_existing(out)
        return out
    if source := policy_flags.CHECKPOINT.value:
        name = "_".join(Path(source).parts[-2:])
    return free(Path("eval") / ENV.value / name)


if __name__ == "__main__":
    flags.run(main)
