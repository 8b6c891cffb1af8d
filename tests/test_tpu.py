"""What is said of TPUs, without one: programs lower for them, and where libtpu is installed its compiler takes them.

Nothing runs. `pip install 'jax[tpu]'` brings libtpu; its compiler needs no chip.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from frameworks import Framework
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_policy import MODEL
from steps import batches, run_config

from experiments.bench_parts import random_batch
from openpi_port import init
from openpi_port.config import Compute
from openpi_port.errors import UserError
from openpi_port.masks import Blocks
from openpi_port.pi_flax import sharding
from openpi_port.pi_flax.attention import attention, prepare
from openpi_port.pi_flax.fast import attend, flow, transfer
from openpi_port.pi_flax.fast.prepare import Prepared

PREFIX = (2, 816, 8, 256)  # samples, tokens, heads and their size, of pi0 with three cameras


@pytest.fixture
def for_tpu(monkeypatch):
    """Kernels are not interpreted, as on a machine with a TPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def gradients(backend: str, size: int = PREFIX[0]):
    """Of attention of a prefix, and the shapes of what it takes."""

    def loss(q, k, v, seen):
        mask = prepare(Blocks(None, seen), backend)
        return attention(q, k, v, mask, backend, scale=q.shape[-1] ** -0.5).astype(jnp.float32).sum()

    _, tokens, heads, dim = PREFIX
    shapes = [(size, tokens, heads, dim), *[(size, tokens, 1, dim)] * 2]
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return jax.grad(loss, argnums=(0, 1, 2)), [*operands, jax.ShapeDtypeStruct((size, tokens), jnp.int32)]


def split(operands: list[jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh) -> list[jax.ShapeDtypeStruct]:
    where = NamedSharding(mesh, P(("data", "fsdp")))
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in operands]


def test_splash_on_several_devices(for_tpu):
    """Forward and two backward kernels, each device's on its own samples: XLA itself refuses to split them."""
    function, operands = gradients("splash")
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*split(operands, mesh)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3
    with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
        jax.jit(function).trace(*split(operands, mesh)).lower(lowering_platforms=("tpu",))


def test_heads_that_share_keys_are_rows():
    """The logits of plain attention are matrices: with heads as a dimension of their own XLA lays them out anew."""
    function, operands = gradients("plain")
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<2x1x6528x1x816xf32>" in text and "tensor<2x1x816x8x816xf32>" not in text


def lowered(jitted: Any, *args: Any) -> str:
    return jitted.trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def test_training_step(for_tpu):
    compute = Compute(dtype="bfloat16", attention="splash", remat="dots", compile="scan", gradients="bfloat16")
    config = run_config(compute=compute)
    trainer = Framework("flax").trainer(config)
    with trainer._surroundings():
        text = lowered(trainer._update, trainer._state, trainer._layout.put(batches(config, 1)[0]), np.float32(1e-4))
    # Forward once for the loss, and not again for the gradient: "dots" keeps what attention gives.
    assert text.count("tpu_custom_call") == 3


def test_a_chunk():
    """Of the plain model and of the prepared one."""
    model = Framework("flax").load(MODEL, init.Fresh(MODEL, 0), Compute(dtype="bfloat16"))
    batch = random_batch(MODEL, 1)
    noise = batch["noise"]
    plain = jax.jit(lambda module_state, batch, noise: model.module.sample_actions(batch, noise, 2))
    observation = {
        key: batch[key] for key in ("image", "image_mask", "state", "tokenized_prompt", "tokenized_prompt_mask")
    }
    assert "stablehlo.while" in lowered(plain, None, observation, noise)
    fast = Prepared(model, flow.Options(align=128))
    inputs = transfer.pack(fast._inputs(batch, noise))
    assert "stablehlo.while" in lowered(fast._sample, fast._weights, fast._times_of(2), *inputs)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),  # which JAX sets where it finds no chip: libtpu is installed, that's all
        ({}, True),  # a TPU VM: JAX asks Google's metadata
        ({"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),  # Kubernetes
        ({"JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_hosts_are_asked_for_on_a_tpu_alone(environment, several, monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert sharding._surroundings() == ({} if several else None)


@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (4, 4), (16, 1)])
def test_a_mesh_of_any_shape(shape):
    """Of 4 x 4 chips, of which an axis of 2 or 8 is a part or more than one."""
    chips = [
        SimpleNamespace(platform="tpu", device_kind="TPU v6 lite", coords=(x, y, 0), core_on_chip=0, process_index=0)
        for x, y in itertools.product(range(4), repeat=2)
    ]
    arranged = sharding._arranged(shape, chips)
    assert arranged.shape == shape and len({chip.coords for chip in arranged.flat}) == 16
    with pytest.raises(UserError, match=r"config.mesh: data=3 times fsdp=1: 3 chips of this TPU are no rectangle"):
        sharding._arranged((3, 1), [*chips[:2], chips[4]])


def test_a_jax_without_the_private_cudnn(monkeypatch):
    """The package opens everywhere, and attention on GPUs is cuDNN's by its public name."""
    q, k = jnp.zeros((1, 8, 8, 256)), jnp.zeros((1, 8, 1, 256))
    assert attend.usable(q, k)
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, "jax._src.cudnn.fused_attention_stablehlo", None)
        importlib.reload(attend)
        assert not attend.usable(q, k)
    importlib.reload(attend)
    assert attend.usable(q, k)


COMPILED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax
jax.default_backend = lambda: "tpu"
from jax.experimental import topologies
from jax.sharding import AxisType
import test_tpu
devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
for backend in ("plain", "splash"):
    function, operands = test_tpu.gradients(backend, size=32)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*test_tpu.split(operands, mesh)).compile()
    print(backend, compiled.as_text().count("all-gather"), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which pip install 'jax[tpu]' brings"
)
def test_compiler():
    """Attention at the size of pi0 over four v5e chips: it fits, and devices tell each other nothing."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    code = COMPILED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert out.returncode == 0, out.stderr[-2000:]
    found = {line.split()[0]: [int(x) for x in line.split()[1:]] for line in out.stdout.splitlines()}
    assert found["plain"][0] == found["splash"][0] == 0
    assert found["splash"][1] < found["plain"][1] < 2**29
