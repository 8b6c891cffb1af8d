"""Knowledge insulation: each loss trains its own half of pi0.5, and what is deployed is plain pi0.5."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import jobs
import numpy as np
import pytest
from frameworks import NAMES, Framework

import openpi_port
from configs import pi0_aloha, pi05_aloha, pi05_aloha_ki
from convert import tables
from openpi_port import checkpoint, init, memory
from openpi_port import grammar as grammars
from openpi_port.config import SIZES, Gemma, Pi0, Siglip, Train
from openpi_port.data import material
from openpi_port.errors import UserError
from openpi_port.fields import build
from openpi_port.tokenizers import fast

B, N = 3, 12
TINY = Pi0(
    vision=Siglip(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=14, image_size=28),
    language=Gemma(width=24, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=8),
    expert=Gemma(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8),
    vocab_size=50,
    action_dim=5,
    action_horizon=6,
    max_token_len=8,
    state_in="prompt",
    time_in="adarms",
    cameras=("base_0_rgb", "left_wrist_0_rgb"),
)
# What belongs to the action expert; all the rest is the vision-language model.
EXPERT = ("gemma/layers/experts/1/", "gemma/norms/1/", "action_in_proj/", "action_out_proj/", "time_mlp_")


def batch_of_noise(seed: int = 0, draws: int = 1) -> dict:
    """Prompts and action tokens of several lengths, and one camera that is missing."""
    rng = np.random.default_rng(seed)
    chunk = (B, TINY.action_horizon, TINY.action_dim)
    drawn = (B,) if draws == 1 else (B, draws)
    return {
        "image": {c: rng.integers(0, 256, (B, 28, 28, 3), np.uint8) for c in TINY.cameras},
        "image_mask": {c: np.array([True, i == 0, True]) for i, c in enumerate(TINY.cameras)},
        "state": rng.standard_normal(chunk[::2], np.float32),
        "tokenized_prompt": rng.integers(2, TINY.vocab_size, (B, 8)).astype(np.int32),
        "tokenized_prompt_mask": np.arange(8) < np.array([[3], [6], [8]]),
        "actions": rng.standard_normal(chunk, np.float32),
        "action_is_pad": np.arange(chunk[1]) >= np.array([[6], [4], [5]]),
        "action_tokens": rng.integers(2, TINY.vocab_size, (B, N)).astype(np.int32),
        "action_tokens_mask": np.arange(N) < np.array([[12], [7], [9]]),
        "noise": rng.standard_normal((*drawn, *chunk[1:]), np.float32),
        "time": rng.uniform(0.1, 1, drawn).astype(np.float32),
    }


@pytest.fixture(scope="module")
def weights():
    """Random in every parameter: fresh ones leave norms and biases at zero."""
    rng = np.random.default_rng(1)
    return {p: x + 0.1 * rng.standard_normal(x.shape, np.float32) for p, x in dict(init.Fresh(TINY, 0)).items()}


@pytest.fixture(scope="module", params=NAMES)
def framework(request):
    return Framework(request.param)


@pytest.fixture(scope="module")
def model(framework, weights):
    return framework.load(TINY, weights)


def insulated(framework):
    return importlib.import_module(f"openpi_port.pi_{framework.name}.insulated")


def losses(framework, model, batch) -> tuple[np.ndarray, np.ndarray]:
    """Of the flow [B, A] and of the tokens [B]."""
    return framework.compiled(model, insulated(framework).losses)(batch, batch["noise"], batch["time"])


def hidden(framework, model, batch) -> np.ndarray:
    """What each action token is predicted from, [B, N, D]."""
    return framework.compiled(model, lambda module, batch: insulated(framework).read(module, batch)[2:])(batch)[0]


@pytest.fixture(scope="module")
def grads(weights):
    """By framework: gradients of the mean loss of the flow, and of the tokens, by canonical name; two draws."""
    return {name: gradients(Framework(name), weights, batch_of_noise(draws=2)) for name in NAMES}


def gradients(framework, weights, batch) -> list[dict[str, np.ndarray]]:
    model, of = framework.load(TINY, weights), insulated(framework).losses
    inputs = framework.array((batch, batch["noise"], batch["time"]))
    if framework.name == "torch":
        found = []
        parameters = dict(model.module.named_parameters())
        for part in (0, 1):
            model.module.zero_grad(set_to_none=True)
            of(model.module, *inputs)[part].mean().backward()
            zero = np.zeros_like
            found.append({n: zero(p.detach()) if p.grad is None else p.grad.numpy() for n, p in parameters.items()})
    else:
        import jax
        from flax import nnx

        graph, state = nnx.split(model.module)

        @jax.jit
        def both(state):
            _, back = jax.vjp(lambda s: tuple(x.mean() for x in of(nnx.merge(graph, s), *inputs)), state)
            return back((1.0, 0.0))[0], back((0.0, 1.0))[0]

        flat = map(nnx.to_flat_state, both(state))
        found = [{"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in tree} for tree in flat]
    return [dict(tables.translate(named, TINY, framework.name, "flax")) for named in found]


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_trains_its_own_half(grads, name):
    """The flow's gradient is exactly zero all over the vision-language model, and the tokens' all over the expert."""
    of_flow, of_tokens = grads[name]
    assert len(of_flow) > 30
    for path in of_flow:
        mine, other = (of_flow, of_tokens) if path.startswith(EXPERT) else (of_tokens, of_flow)
        assert np.abs(mine[path]).max() > 0, path
        assert not other[path].any(), path


def test_gradients_agree(grads):
    """Of every parameter, among the frameworks."""
    for flax, torch in zip(*grads.values(), strict=True):
        for path, grad in flax.items():
            np.testing.assert_allclose(torch[path], grad, atol=1e-4 * max(1, np.abs(grad).max()), rtol=0, err_msg=path)


def test_plain_flow_is_not_insulated(weights):
    """pi0.5's own loss fails the test above, so it can."""
    framework = Framework("torch")
    of_flow = framework.gradients(framework.load(TINY, weights), batch_of_noise())
    assert all(of_flow[path].any() for path in ("vision/patch_embed/kernel", "gemma/layers/experts/0/k/kernel"))


def test_expert_does_not_see_the_action_tokens(framework, model):
    """Their content and number leave the flow's loss as it is, to the bit; and it is plain pi0.5's."""
    batch = batch_of_noise()
    flow, tokens = losses(framework, model, batch)
    other = {**batch, "action_tokens": batch["action_tokens"][:, ::-1].copy()}
    other["action_tokens_mask"] = np.arange(N) < np.array([[4], [12], [1]])
    flow_, tokens_ = losses(framework, model, other)
    np.testing.assert_array_equal(flow, flow_)
    assert np.abs(tokens - tokens_).min() > 1e-3
    np.testing.assert_allclose(flow, model.loss(batch, batch["noise"], batch["time"]), atol=2e-6, rtol=1e-6)


def test_tokens_are_predicted_from_what_came_before(framework, model):
    """What `read` hands out for token n depends on tokens before n alone; the first comes from the whole prompt."""
    batch = batch_of_noise()
    changed = {**batch, "action_tokens": batch["action_tokens"].copy()}
    changed["action_tokens"][:, 4] += 1
    prompt = {**batch, "tokenized_prompt": batch["tokenized_prompt"].copy()}
    prompt["tokenized_prompt"][:, 1] = 1
    want, got, first = (hidden(framework, model, b) for b in (batch, changed, prompt))
    assert want.shape == (B, N, TINY.language.width)
    np.testing.assert_array_equal(got[:, :5], want[:, :5])
    for row, count in enumerate(batch["action_tokens_mask"].sum(1)):
        assert (np.abs(got[row, 5:count] - want[row, 5:count]).max(-1) > 1e-5).all()
    assert (np.abs(first - want)[:, 0].max(-1) > 1e-5).all()


def test_padding_takes_no_part(framework, model):
    """A sample's loss, from its cameras, prompt and tokens without padding and by plain softmax."""
    batch, row = batch_of_noise(), 1
    _, want = losses(framework, model, batch)
    one = {key: batch[key][row : row + 1] for key in batch if not key.startswith("image")}
    one |= {key: {c: x[row : row + 1] for c, x in batch[key].items()} for key in ("image", "image_mask")}
    for name in ("tokenized_prompt", "action_tokens"):
        mask = one[f"{name}_mask"][0]
        one |= {name: one[name][:, mask], f"{name}_mask": one[f"{name}_mask"][:, mask]}
    table = framework.numpy(model.module.gemma.embedding)
    scores = hidden(framework, model, one)[0].astype(np.float64) @ table.T.astype(np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    tokens = one["action_tokens"][0]
    assert len(tokens) == 7
    assert -scores[np.arange(7), tokens].mean() == pytest.approx(want[row], abs=2e-5)


# --- the main job ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(own_caches, tmp_path_factory) -> Train:
    config = jobs.debug(pi05_aloha_ki, tmp_path_factory.mktemp("run"), peak_lr=2e-3, backend="torch", num_steps=15)
    return jobs.with_data(config, validation=0.0)


def curves(path: Path) -> np.ndarray:
    """Loss, loss of the flow, loss of the tokens, of every step: [steps, 3]."""
    return np.transpose([jobs.logged(path, key) for key in ("loss", "loss_flow", "loss_tokens")])


@pytest.fixture(scope="module")
def torch_run(job) -> Path:
    """15 steps."""
    return jobs.run(job)


def test_both_losses_fall(torch_run):
    curve = curves(torch_run)
    np.testing.assert_allclose(curve[:, 0], curve[:, 1] + curve[:, 2], rtol=1e-6)
    assert (curve[-4:].mean(0) < [1, 0.9, 0.95] * curve[:4].mean(0)).all()


def test_frameworks_train_alike(job, torch_run, tmp_path):
    """Three steps: the losses; then torch goes on where Flax stopped."""
    config = dataclasses.replace(job, out=str(tmp_path))
    jobs.run(dataclasses.replace(config, backend="flax", num_steps=3))
    path = jobs.run(dataclasses.replace(config, num_steps=5), resume=True)
    np.testing.assert_allclose(curves(path), curves(torch_run)[:5], atol=1e-4, rtol=0)


def test_checkpoint_is_pi05(job, torch_run):
    """It opens as pi0.5, in either framework, and holds the tokenizer that it was trained with."""
    path = torch_run / "15"
    assert checkpoint.read_policy(path).train.insulate
    assert fast.load(str(path / "fast_tokenizer")).token_bytes == fast.load("fast_aloha").token_bytes
    plain = build(Train, pi05_aloha.get_config("debug")).model
    batch = next(material.load(job).batches(0))
    noise = batch["noise"][:, 0]
    actions = []
    for name in NAMES:
        model = openpi_port.load_model(path, name, device="cpu")
        assert model.config == dataclasses.replace(plain, vocab_size=1152)
        actions.append(model.sample_actions(batch, noise, num_steps=2))
    np.testing.assert_allclose(*actions, atol=1e-4, rtol=0)
    policy = openpi_port.Policy.from_pretrained(path, "torch", device="cpu")
    answer = policy.infer({"images": {"top": np.zeros((48, 64, 3), np.uint8)}, "state": np.zeros(14), "prompt": "x"})
    assert answer["actions"].shape == (50, 14)


def test_batches(job):
    """The tokens decode to the chunk that the flow learns, up to the tokenizer's rounding; prompts are pi0.5's."""
    data, plain = material.load(job), material.load(dataclasses.replace(job, insulate=False))
    batch, other = next(data.batches(0)), next(plain.batches(0))
    for key in other:
        if key not in ("image", "image_mask"):
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)
    for tokens, mask, actions in zip(
        batch["action_tokens"], batch["action_tokens_mask"], batch["actions"], strict=True
    ):
        chunk = data.sequence.decode_actions(grammars.until_end(tokens[mask]), *actions.shape)
        assert np.sqrt(np.square(chunk - actions).mean(0)).max() < 0.05
    prompt = batch["tokenized_prompt"][0][batch["tokenized_prompt_mask"][0]]
    assert data.tokenizer.decode_text(prompt).endswith("\nAction: ")


def test_mistakes(job):
    with pytest.raises(UserError, match="max_action_tokens=10"):
        next(material.load(dataclasses.replace(job, max_action_tokens=10)).batches(0))
    with pytest.raises(UserError, match=r"insulate=True is for pi0\.5"):
        dataclasses.replace(build(Train, pi0_aloha.get_config("debug")), insulate=True)


def test_configs():
    """Every size builds, reads back and starts from pi0.5's weights."""
    for size in SIZES:
        config, plain = (build(Train, module.get_config(size)) for module in (pi05_aloha_ki, pi05_aloha))
        assert config.insulate and not plain.insulate
        assert build(Train, dataclasses.asdict(config)) == config
        assert memory.plan(config).activations > memory.plan(plain).activations
    base = build(Train, pi05_aloha_ki.get_config("base"))
    assert base.model == build(Train, pi05_aloha.get_config("base")).model
    assert base.init == "gs://openpi-assets/checkpoints/pi05_base" and base.name == "pi05_aloha_ki"
