"""Closed-loop and open-loop evaluation: chunks, seeds, intervals, results, and what users see when it can't run."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial

import av
import commands
import numpy as np
import pytest
from conftest import ROOT
from small_policy import FAST, MODEL, make_checkpoint

from experiments import compare, eval_report, open_loop
from openpi_port import Policy, UserError
from openpi_port.sim import gl, pictures, rollout, simulation, wilson
from openpi_port.sim.aloha import AlohaSim
from openpi_port.sim.expert import Expert

NO_PICTURES = rollout.Setting("transfer_cube", max_steps=300, after=20, render=False)
needs_gl = pytest.mark.skipif(
    not any(gl.works(name) for name in gl.BACKENDS), reason="no OpenGL: apt-get install libosmesa6"
)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(50, 50, 0.9287, 1.0), (0, 50, 0.0, 0.0713), (38, 50, 0.6259, 0.8570), (1, 2, 0.0945, 0.9055)],
)
def test_wilson(successes, episodes, low, high):
    """Against published tables of Wilson's interval."""
    np.testing.assert_allclose(wilson.interval(successes, episodes), (low, high), atol=1e-4)


class Scripted:
    """Answers the expert's targets in chunks; knows each robot by its noise, which is keyed by the seed."""

    def __init__(self, seeds, shape):
        self.shape, self.asked = shape, []
        self.plans = {}
        for seed in seeds:
            with AlohaSim(render=False) as sim:
                sim.reset(seed)
                self.plans[seed] = Expert("transfer_cube")(sim.cube, tail=400).actions
        self.seeds = {
            (seed, call): rollout.draw_noise(seed, call, shape).tobytes() for seed in seeds for call in range(20)
        }

    def __call__(self, observations):
        self.asked.append(len(observations))
        out = []
        for o in observations:
            assert o["prompt"] == "Transfer cube" and o["state"].shape == (14,)
            (seed, call) = next(k for k, v in self.seeds.items() if v == o["noise"].tobytes())
            out.append({"actions": self.plans[seed][25 * call : 25 * call + 50]})
        return out


def test_chunks_move_the_cube_and_batches_change_nothing():
    seeds, shape = [0, 3], (50, 14)
    together = Scripted(seeds, shape)
    episodes = list(rollout.rollout(NO_PICTURES, seeds, together, workers=2, noise_shape=shape))
    assert [e.seed for e in episodes] == seeds and together.asked[0] == 2
    for e in episodes:
        assert e.success and e.end == "transfer_cube" and e.rewards[-21] == 4 and (e.rewards[:-21] < 4).all()
        np.testing.assert_array_equal(e.actions, together.plans[e.seed][: len(e.actions)])
    (alone,) = rollout.rollout(NO_PICTURES, [3], Scripted([3], shape), workers=1, noise_shape=shape)
    np.testing.assert_array_equal(alone.states, episodes[1].states)
    (expert,) = rollout.rollout(NO_PICTURES, [3], None, workers=1)
    np.testing.assert_array_equal(expert.states, alone.states)


class CountingSim(AlohaSim):
    """Its pictures say how many there have been."""

    looks = 0

    def observe(self):
        self.looks += 1
        return {**super().observe(), "images": {"top": np.full((8, 8, 3), self.looks, np.uint8)}}


@pytest.mark.parametrize(("film", "looks"), [(False, 2), (True, 17)])
def test_only_what_is_looked_at_is_rendered(film, looks):
    """A picture per chunk, and for the video those of steps 0, 2, ... 28 and of the end, where 0 is both."""
    setting = rollout.Setting("transfer_cube", max_steps=30, replan=25, frames_every=2, frame_size=8)
    with CountingSim(render=False) as sim:
        stage = rollout._Stage(sim, setting)
        seen = stage.reset(0, film)
        for steps in (25, 5):
            assert (seen[0]["images"]["top"] == sim.looks).all()  # of now, not of before
            seen = stage.play(np.tile(seen[1], (steps, 1)))
        episode = stage.episode()
        assert seen is None and sim.looks == looks
    if film:
        assert [frame[0, 0, 0] for frame in episode.frames] == [*range(1, 14), 15, 16, 17]  # 14 was for the policy
    else:
        assert episode.frames is None


@needs_gl
def test_looking_changes_nothing():
    plan = Expert("transfer_cube")
    states = []
    for every in (1, 50):
        with AlohaSim(image_size=32) as sim:
            sim.reset(0)
            for t, action in enumerate(plan(sim.cube).actions[:150]):
                if t % every == 0:
                    sim.observe()
                sim.step(action)
            states.append(sim.state)
    np.testing.assert_array_equal(states[0], states[1])


def test_an_episode_may_be_played_to_its_end():
    setting = rollout.Setting("transfer_cube", max_steps=250, after=None, render=False)
    scripted = Scripted([0], (50, 14))
    (episode,) = rollout.rollout(setting, [0], scripted, workers=1, noise_shape=(50, 14))
    assert episode.success and len(episode.rewards) == 250 and episode.end == "transfer_cube"


def test_an_episode_ends_at_max_steps():
    setting = rollout.Setting("transfer_cube", max_steps=30, replan=25, render=False)
    stay = lambda observations: [{"actions": np.tile(o["state"], (50, 1))} for o in observations]  # noqa: E731
    (episode,) = rollout.rollout(setting, [0], stay, workers=4)
    assert not episode.success and episode.end is None and len(episode.rewards) == 30 and episode.frames is None


def test_commands_that_break_the_physics_fail_their_own_episode():
    def wild(observations):
        shakes = np.random.default_rng(0).choice([-100.0, 100.0], (50, 14))
        return [{"actions": o["state"] + (shakes if o["noise"][0, 0] < 0 else np.zeros((50, 1)))} for o in observations]

    setting = rollout.Setting("transfer_cube", max_steps=25, render=False)
    signs = {seed: rollout.draw_noise(seed, 0, (1, 1))[0, 0] < 0 for seed in range(8)}
    seeds = [next(s for s in signs if signs[s]), next(s for s in signs if not signs[s])]
    first, second = rollout.rollout(setting, seeds, wild, workers=1, noise_shape=(1, 1))
    assert first.diverged and not first.success and len(first.states) == len(first.rewards) < 25
    assert not second.diverged and len(second.rewards) == 25


@pytest.mark.parametrize(
    ("setting", "answer", "words"),
    [
        (NO_PICTURES, np.zeros((10, 14)), "--replan=25"),
        (NO_PICTURES, np.full((50, 14), np.nan), "finite joint targets"),
        (NO_PICTURES, np.zeros((50, 7)), "14 finite joint targets"),
        (rollout.Setting("transfer_cub", render=False), np.zeros((50, 14)), "transfer_cube"),
    ],
)
def test_faults_are_one_line(setting, answer, words):
    with pytest.raises(UserError, match=words):
        list(rollout.rollout(setting, [0], lambda o: [{"actions": answer}] * len(o), workers=1))


def test_a_dead_process_is_one_line(monkeypatch):
    def kill(observations):
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        return [{"actions": np.zeros((50, 14))}]

    with pytest.raises(UserError, match="process died"):
        list(rollout.rollout(NO_PICTURES, [0], kill, workers=1))


def episode(frames, success):
    images = np.full((frames, 32, 32, 3), 100, np.uint8)
    ones = np.ones((frames, 14), np.float32)
    return rollout.Episode(
        0, success, "transfer_cube" if success else None, False, ones, ones, np.ones(frames, int), images, 1.0
    )


def test_grid_and_videos(tmp_path):
    shown = [episode(5, True), episode(9, False), episode(7, True)]
    frames = list(pictures.grid([shown[:2], shown[2:]], ["two", "one"]))
    size, title = 38, pictures.TITLE
    assert len(frames) == 9 + 12 and frames[0].shape == (2 * (size + title), 2 * size, 3)
    assert (frames[0][:title] != pictures.RUNNING).any()  # the title
    assert tuple(frames[3][title, 0]) == pictures.RUNNING and tuple(frames[4][title, 0]) == pictures.GOOD
    assert tuple(frames[8][title, size]) == pictures.BAD and (frames[8][2 * title + size :, size:] == 90).all()
    pictures.write_mp4(tmp_path / "grid.mp4", iter(frames), 25)
    with av.open(str(tmp_path / "grid.mp4")) as video:
        assert len(list(video.decode(video=0))) == len(frames)
        assert video.streams.video[0].average_rate == 25
    pictures.write_gif(tmp_path / "grid.gif", iter(frames), 25)
    assert (tmp_path / "grid.gif").read_bytes().startswith(b"GIF89a")


def test_a_plot_shows_where_chunks_began(tmp_path, monkeypatch):
    """Which with latency, or real-time chunking, is not every `replan` steps; an expert has none."""
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure.axes))
    about = simulation.about("transfer_cube")
    for borders in ((), (12, 37, 99)):  # the last after the end
        pictures.plot_episode(tmp_path, dataclasses.replace(episode(60, False), borders=borders), about)
        marks = sorted(line.get_xdata()[0] for line in drawn[-1][-1].lines if line.get_zorder() == 0)
        assert marks == pytest.approx([step / about.fps for step in borders if step < 60])
        assert ("a new chunk" in drawn[-1][0].get_title()) == bool(borders)


@pytest.mark.parametrize(("count", "lengths"), [(0, []), (1, [1]), (3, [3]), (5, [5]), (7, [4, 3]), (16, [4] * 4)])
def test_rows_of_the_grid(count, lengths):
    assert [len(row) for row in pictures.rows([episode(1, True)] * count)] == lengths


def test_what_each_instruction_led_to(tmp_path, capsys):
    """Lifted on the way to handing over is not held: the end counts."""
    lifted, lost = episode(2, True), episode(2, False)
    lifted = dataclasses.replace(lifted, end="lift_cube")
    moved = episode(2, True)
    with_seeds = lambda *es: [dataclasses.replace(e, seed=i) for i, e in enumerate(es)]  # noqa: E731
    played = {"transfer_cube": with_seeds(moved, moved, lost), "lift_cube": with_seeds(lifted, moved, lifted)}
    eval_report.instructions(played, tmp_path, gif=False)
    numbers = json.loads((tmp_path / "instructions.json").read_text())
    assert numbers["decided"] == 1 and numbers["seeds"] == 3
    assert numbers["tasks"]["lift_cube"]["right"] == 2
    assert numbers["tasks"]["lift_cube"]["ends"] == {"lift_cube": 2, "transfer_cube": 1}
    assert numbers["tasks"]["transfer_cube"]["ends"] == {"transfer_cube": 2, "neither": 1}
    assert "decided on 1 of 3 seeds" in capsys.readouterr().out and (tmp_path / "grid.mp4").stat().st_size


def saved(path, errors, rewards, **settings):
    """An evaluation's directory with one seed per error; the error begins at step 5."""
    (path / "trajectories").mkdir(parents=True)
    results = [{"seed": i, "success": max(r) == 4} for i, r in enumerate(rewards)]
    fields = {"env": "e", "prompt": "p", "replan": 25, "max_steps": 8, "after_success": 0, "results": results}
    (path / "results.json").write_text(json.dumps(fields | settings))
    for i, (error, reward) in enumerate(zip(errors, rewards, strict=True)):
        actions = np.zeros((8, 14), np.float32)
        actions[5:, 3] = error
        arrays = {"states": np.zeros((8, 14), np.float32), "actions": actions, "rewards": np.array(reward)}
        np.savez(path / "trajectories" / f"seed_{i:04d}.npz", **arrays)
    return path


def test_errors_of_chunks_beside_the_spread_of_what_was_recorded(tmp_path, capsys):
    recorded = np.random.default_rng(0).normal(size=(40, 6, 2)) * [1.0, 3.0]
    recorded[:, 4:] = np.nan  # past the episodes' end
    open_loop.report(-recorded, recorded, tmp_path, "x", ["a", "long name"])
    numbers = json.loads((tmp_path / "open_loop.json").read_text())
    np.testing.assert_allclose(numbers["rmse"], numbers["spread"], rtol=0.05)  # as of whoever always says the mean
    np.testing.assert_allclose(numbers["spread"], recorded[:, :4].std(axis=(0, 1)))
    assert len(numbers["mae_by_step"]) == 4 and "long name" in capsys.readouterr().out


def test_two_evaluations_seed_by_seed(tmp_path, capsys):
    early, late, fail = [0, 0, 1, 2, 2, 4, 4, 4], [0, 0, 0, 0, 0, 0, 1, 4], [0] * 8
    a = saved(tmp_path / "a", [0, 0, 0, 0], [early, late, fail, early])
    b = saved(tmp_path / "b", [0.1, 0.1, 0.1, 1e-6], [early, late, early, early])
    chaos, parted, differently, same = compare.compare(a, b)
    assert (chaos.touch, chaos.parts(1e-3), chaos.before) == (2, 5, 0.0)
    assert (parted.touch, parted.parts(1e-3)) == (6, 5) and parted.before == pytest.approx(0.1)
    assert differently.success == (False, True) and differently.touch == 2
    assert same.parts(1e-3) is None and same.error[-1] == pytest.approx(1e-6)
    assert compare.main([str(a), str(b), f"--out={tmp_path / 'c.png'}"]) == 0
    said = capsys.readouterr().out
    assert "both succeed on 3, neither on 0, A alone on none, B alone on [2]" in said
    assert "agree within 0.001 on 3 of 4 seeds" in said and said.count("before the touch") == 1
    assert (tmp_path / "c.png").stat().st_size
    saved(tmp_path / "many/x/lift", [0], [early])
    saved(tmp_path / "many/y/lift", [0.1], [early])
    assert compare.main([str(tmp_path / "many/x"), str(tmp_path / "many/y"), f"--out={tmp_path / 'c.png'}"]) == 0
    assert "both succeed on 1" in capsys.readouterr().out and (tmp_path / "c_lift.png").exists()
    other = saved(tmp_path / "other", [0], [early], replan=10)
    assert compare.main([str(a), str(other)]) == 2 and "replan" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "many/x"), str(tmp_path / "none")]) == 2
    assert re.search(r"none/\w+/results.json: cannot be read \(No such file or directory\)", capsys.readouterr().err)
    (b / "trajectories/seed_0001.npz").unlink()
    assert compare.main([str(a), str(b)]) == 2 and "--trajectories" in capsys.readouterr().err


command = partial(commands.run, "experiments.eval")


def test_what_evaluates_loads_no_opengl():
    """Its LLVM would meet Triton's."""
    code = (
        "import sys; from experiments import eval; from openpi_port.sim import simulation\n"
        "for task in eval.ALOHA.values(): print(simulation.about(task).instruction)\n"
        "assert not any(name.partition('.')[0] in ('mujoco', 'dm_control', 'OpenGL') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Transfer cube", "Lift the cube with the right arm and hold it"]


def test_a_wrong_command_is_one_line():
    done = command("--env=aloha_transfer", "--expert")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "did you mean aloha_transfer_cube" in done.stderr


def test_without_opengl_the_command_says_so():
    done = command("--expert", MUJOCO_GL="off")
    assert done.returncode == 2 and done.stderr.startswith("error: no OpenGL") and done.stderr.count("\n") == 1


@needs_gl
def test_the_command(tmp_path):
    cameras = {"base_0_rgb": "observation.images.top"}
    path = make_checkpoint(tmp_path / "20", robot="aloha_sim", cameras=cameras, delta=())
    arguments = [f"--checkpoint={path}", "--backend=torch", "--episodes=1", "--max_steps=6", "--replan=4"]
    done = command(*arguments, f"--out={tmp_path / 'out'}", "--seed=7", "--trajectories")
    assert done.returncode == 0, done.stderr
    assert "0 of 1 episodes succeeded: 0% (95% interval 0.0% to 79.3%)" in done.stdout
    numbers = json.loads((tmp_path / "out/results.json").read_text())
    (result,) = numbers["results"]
    assert result["seed"] == 7 and not result["success"] and result["best_reward"] == 0
    assert result["steps"] == 6 or result["diverged"]
    assert numbers["policy"]["checkpoint"] == str(path) and numbers["replan"] == 4
    with np.load(tmp_path / "out/trajectories/seed_0007.npz") as arrays:
        assert arrays["states"].shape == arrays["actions"].shape == (len(arrays["rewards"]), 14)
    assert (tmp_path / "out/grid.mp4").stat().st_size and (tmp_path / "out/episodes/seed_0007.png").stat().st_size


EMBEDDED = {
    "repo_id": "aloha_sim_transfer_cube",
    "robot": "aloha_sim",
    "cameras": {"base_0_rgb": "observation.images.top"},
    "delta": (),
    "cache_gb": 0.0,
}


def test_open_loop_on_the_data_set_that_ships(tmp_path):
    path = make_checkpoint(tmp_path / "20", **EMBEDDED)
    out = tmp_path / "out"
    done = command(
        f"--checkpoint={path}", "--backend=torch", "--env=dataset", "--samples=3", "--plots=1", f"--out={out}"
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads((out / "open_loop.json").read_text())
    assert numbers["samples"] == 3 and len(numbers["mae"]) == 14 and len(numbers["mae_by_step"]) == 4
    assert np.isfinite(numbers["mae"]).all() and len(list((out / "chunks").iterdir())) == 1
    assert numbers["dimensions"][0] == "0 left_arm_waist" and "spread" in done.stdout
    again = command(f"--checkpoint={path}", "--env=dataset", f"--out={out}")
    assert again.returncode == 2 and "out exists already and is not overwritten" in again.stderr


PI05 = dataclasses.replace(MODEL, state_in="prompt", time_in="adarms", max_token_len=120)


@pytest.mark.parametrize("model", [PI05, FAST])
def test_open_loop_of_other_models(tmp_path, model):
    """Whose prompts hold the state, and whose chunks are tokens."""
    path = make_checkpoint(tmp_path / "20", model, **EMBEDDED)
    policy = Policy.from_pretrained(path, "torch", device="cpu")
    open_loop.evaluate(policy, tmp_path / "out", samples=2, plots=0)
    numbers = json.loads((tmp_path / "out/open_loop.json").read_text())
    assert numbers["samples"] == 2 and len(numbers["rmse"]) == 14 and np.isfinite(numbers["rmse"]).all()
