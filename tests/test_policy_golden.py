"""The whole policy against LeRobot: its processors' numbers and tokens, and its chunks of actions.

LeRobot's tokens here come from Gemma's tokenizer (PaliGemma's is gated), whose text ids are PaliGemma's. The models are
far too small for its vocabulary; so the processors are compared without them, and the models are given the golden ids.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from frameworks import NAMES, Framework, batch_of

from convert import formats, target
from openpi_port import transforms
from openpi_port.config import Data
from openpi_port.fields import build
from openpi_port.grammar import until_end
from openpi_port.normalize import Stats
from openpi_port.policy import Policy
from openpi_port.tokenizers import fast, paligemma
from openpi_port.tokenizers.fast_sequence import FastSequence

# LeRobot's time embedding is float64, ours float32 as openpi's: losses and chunks differ by up to 2.6e-4.
# Where the image is resized, LeRobot keeps floats and we round to 8 bits, as openpi: that alone makes 4e-3 (fed with
# LeRobot's floats the model is 5e-5 away), 6.3e-3 was measured.
ATOL = {"policy": 5e-4, "policy_rect": 1e-2}
BLACK = np.zeros((224, 224, 3), np.uint8)


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def lerobot(request, golden):
    path = golden / "lerobot" / request.param
    inputs, outputs = (dict(np.load(path / f"{name}.npz")) for name in ("inputs", "outputs_float32"))
    return SimpleNamespace(name=request.param, path=path / "pretrained", root=path, inputs=inputs, outputs=outputs)


class Given:
    """Stands where the tokenizer does; the prompt is the number of the golden sample."""

    vocab_size = 512

    def __init__(self, batch):
        self.batch = batch

    def encode(self, prompt, state, max_len, **_):
        return tuple(self.batch[key][int(prompt)] for key in ("tokenized_prompt", "tokenized_prompt_mask"))


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("images", ["policy", "policy_rect"])
def test_chunks(lerobot, framework, images):
    """Cameras by name, one missing; state and actions padded and cut; noise to actions. No statistics in between."""
    source = formats.open_checkpoint(lerobot.path, max_token_len=16)
    backend = Framework(framework)
    model = backend.load(source.model, dict(source.canonical()))
    one = lambda size: Stats(*(np.full(size, x, np.float64) for x in (0, 1, -1, 1, -1, 1)), count=1)  # noqa: E731
    data = build(Data, {"repo_id": "", **source.settings["data"]}, "data")
    batch = batch_of(lerobot.root)
    policy = Policy(model, data, {"state": one(6), "actions": one(7)}, Given(batch))
    base = batch["policy"]["rect_image"] if images == "policy_rect" else batch["image"]["base_0_rgb"]
    observations = [
        {
            "observation.images.base_0_rgb": base[i],
            "observation.images.left_wrist_0_rgb": batch["image"]["left_wrist_0_rgb"][i],
            "observation.state": batch["policy"]["state"][i],
            "prompt": str(i),
        }
        for i in range(2)
    ]
    chunks = np.stack([r["actions"] for r in policy.infer_batch(observations, batch["noise"])])
    reference = "outputs_v062_float32" if images == "policy_rect" else "outputs_float32"
    theirs = np.load(lerobot.root / f"{reference}.npz")[f"{images}/action_chunk"]
    np.testing.assert_allclose(chunks, theirs, atol=ATOL[images], rtol=0)


def test_processors(lerobot, shared):
    """Normalised state, tokens, and actions in the robot's units, with the checkpoint's own statistics."""
    source = formats.open_checkpoint(lerobot.path)
    data = build(Data, {"repo_id": "", **source.settings["data"]}, "data")
    tokenizer = paligemma.PromptTokenizer(shared / "tokenizers" / "paligemma_tokenizer.model")
    steps = transforms.pipeline(data, source.model, source.norm_stats, tokenizer)
    inputs, outputs = lerobot.inputs, lerobot.outputs
    for i, task in enumerate(inputs["processor/task"]):
        cameras = dict.fromkeys(data.cameras.values(), BLACK)
        sample = transforms.forward(steps, {**cameras, data.state: inputs["processor/state"][i], "task": str(task)})
        # LeRobot's eps under the standard deviation is 1e-8, openpi's and ours 1e-6.
        np.testing.assert_allclose(sample["state"][:6], outputs["processor/observation.state"][i], atol=1e-5, rtol=1e-5)

        mask = outputs["processor/observation.language.attention_mask"][i]
        theirs = outputs["processor/observation.language.tokens"][i][mask]
        ours = sample["tokenized_prompt"][sample["tokenized_prompt_mask"]]
        np.testing.assert_array_equal(ours, theirs)

        actions = np.pad(inputs["processor/norm_actions_in"][i], ((0, 0), (0, 1)))
        back = transforms.inverse(steps, {"actions": actions, "state": sample["state"]})
        np.testing.assert_allclose(back["actions"], outputs["processor/unnormalized_actions"][i], atol=1e-5, rtol=1e-5)


def test_fast_processors(golden, shared, tmp_path):
    """pi0-FAST's sequence as LeRobot writes it, before and after a conversion, and what generated tokens mean."""
    root = golden / "lerobot" / "pi0_fast"
    inputs, outputs = (dict(np.load(root / f"{name}.npz")) for name in ("inputs", "outputs_float32"))
    text = paligemma.PromptTokenizer(shared / "tokenizers" / "paligemma_tokenizer.model")
    sequence = FastSequence(text, fast.load(str(shared / "tokenizers" / "fast_universal")))
    target.write(formats.open_checkpoint(root / "pretrained"), tmp_path / "torch", "torch")
    for path in (root / "pretrained", tmp_path / "torch"):
        source = formats.open_checkpoint(path, max_token_len=456)
        assert source.settings["train"]["fast_tokenizer"] == "physical-intelligence/fast"
        data = build(Data, {"repo_id": "", **source.settings["data"]}, "data")
        steps = transforms.pipeline(data, source.model, source.norm_stats, sequence)
        for i, task in enumerate(inputs["processor/task"]):
            cameras = dict.fromkeys(data.cameras.values(), BLACK)
            raw = {**cameras, data.state: inputs["processor/state"][i], "task": str(task)}
            given = transforms.forward(steps, {**raw, data.actions: inputs["processor/actions"][i]})
            prompt = outputs["processor/observation.language.tokens"][i]
            prompt = prompt[outputs["processor/observation.language.attention_mask"][i]]
            actions = outputs["processor/action.tokens"][i][outputs["processor/action.token_mask"][i]]
            tokens, seen, causal, scored = (
                given[k] for k in ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")
            )
            np.testing.assert_array_equal(tokens[seen & (causal == 0)], prompt)
            np.testing.assert_array_equal(tokens[seen & (causal == 1)], actions)
            np.testing.assert_array_equal(tokens[scored], actions[1:])  # all but the <bos>

            asked = transforms.forward(steps, raw)
            np.testing.assert_array_equal(asked["tokenized_prompt"][asked["tokenized_prompt_mask"]], [*prompt, 2])
            assert not asked["token_ar_mask"].any()
            generated = until_end(inputs["processor/generated_tokens"][i])
            chunk = sequence.decode_actions(generated, *outputs["processor/detokenized_actions"][i].shape)
            np.testing.assert_allclose(chunk, outputs["processor/detokenized_actions"][i], atol=1e-6)
