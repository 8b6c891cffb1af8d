"""pi0 and pi0.5 on a CPU, one sample at a time, as programs that torch's compiler makes ahead of time (AOTInductor).

Of a small model's chunk, half the time is what calling 1,900 operations costs. Compiled, what lies between two products
is one loop, and Python makes a dozen calls a chunk. Weights are arguments of the programs, and numbers of tokens are
open, so those of an architecture serve all its checkpoints, prompts and numbers of cameras.

They are kept in `~/.cache/openpi_port/torch`, for this processor, this torch and this code alone.

P prefix tokens, S = P + suffix keys.
"""

from __future__ import annotations

import copy
import hashlib
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from tqdm import tqdm

from openpi_port import host, whole
from openpi_port.errors import UserError
from openpi_port.pi_torch.fast import onednn
from openpi_port.pi_torch.fast.flow import Flow, Inputs, Past
from openpi_port.pi_torch.fast.pack import Step
from openpi_port.pi_torch.pi0 import Pi0

NARROW = 128  # channels; a model with fewer is one for tests, and not worth the compiler's time
PROGRAMS = ("vision", "prefix", "step")


def pays(module: Pi0) -> bool:
    """Whether a model is to be compiled: a small one on a CPU, for which a C++ compiler is there."""
    weights = list(module.parameters())
    size = sum(p.numel() for p in weights) * getattr(torch, module.compute.dtype).itemsize
    if weights[0].device.type != "cpu" or size > onednn.MOST or module.config.expert.width < NARROW:
        return False
    if not has_compiler():
        print("no C++ compiler (apt-get install g++): a chunk takes half as long again without", file=sys.stderr)
    return has_compiler()


def has_compiler() -> bool:
    """Whether torch finds a C++ compiler, by $CXX or as g++."""
    from torch._inductor import cpp_builder, exc  # takes a second

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


class Compiled:
    """What `Flow` does to one sample, by programs, which are made if they aren't there.

    Args:
      flow: on a CPU, its weights not laid out.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow, language = flow, flow.language
        self._language = _changed(language, see=self._see)
        self._weights = {
            "vision": language.vision,
            "prefix": (language.blocks, language.norms, language.last, language.turns, flow.entry, flow.state),
            "step": (flow.blocks, flow.entry, flow.out),
        }
        self._flat = {name: _tensors(weights) for name, weights in self._weights.items()}
        self._steps: dict[int, list[list[Tensor]]] = {}
        path = _place(flow)
        if not path.exists():
            self._make(path)
        self._programs = {name: _open(path / f"{name}.pt2") for name in PROGRAMS}

    def prefix(self, inputs: Inputs) -> Tensor:
        """See `Flow.prefix`."""
        return self._language.embed_prefix(inputs.images, inputs.tokens, inputs.order)

    def prefill(self, x: Tensor, length: Tensor, state: Tensor) -> list[Tensor]:
        """See `Flow.prefill`; the tensors of what that returns."""
        return self._run("prefix", x, length, state)

    def sample_actions(self, inputs: Inputs, num_steps: int) -> Tensor:
        """See `Flow.sample_actions`."""
        past, x_t = self.prefill(self.prefix(inputs), inputs.length, inputs.state), inputs.noise
        if num_steps not in self._steps:
            self._steps[num_steps] = [_tensors(_with_tensor(step)) for step in self._flow.steps(num_steps)]
        for step in self._steps[num_steps]:
            (x_t,) = self._run("step", *step, *past, x_t)
        return x_t

    def _run(self, name: str, *inputs: Tensor) -> list[Tensor]:
        return self._programs[name]([*self._flat[name], *inputs])

    def _see(self, images: Tensor) -> Tensor:
        """See `Language.see`; one image after another."""
        if images.dtype != torch.uint8:
            return self._flow.language.see(images)
        return torch.cat([self._run("vision", image)[0] for image in images.split(1, 1)], 1)

    # What is compiled: the methods of `Flow`, with weights that are arguments.

    def _traced_vision(self, vision: Any, image: Tensor) -> Tensor:
        return _changed(self._flow.language, vision=vision).see(image)

    def _traced_prefix(self, weights: Any, x: Tensor, length: Tensor, state: Tensor) -> Past:
        blocks, norms, last, turns, entry, to_token = weights
        language = _changed(self._flow.language, blocks=blocks, norms=norms, last=last, turns=turns)
        past = _changed(self._flow, language=language, entry=entry, state=to_token).prefill(x, length, state)
        return past._replace(k=[k.clone() for k in past.k], v=[v.clone() for v in past.v])

    def _traced_step(self, weights: Any, step: Step, past: Past, x_t: Tensor) -> Tensor:
        blocks, entry, out = weights
        past = past._replace(seen=past.seen._replace(keys=past.k[0].shape[1]))
        return _changed(self._flow, blocks=blocks, entry=entry, out=out).step(step, past, x_t)

    def _make(self, path: Path) -> None:
        """Compiles all three into a directory, which is there whole or not at all."""
        config, dtype = self._flow.config, self._flow.language.dtype
        pixels, most = config.vision.image_size, config.prefix_len
        image = torch.zeros(1, 1, pixels, pixels, 3, dtype=torch.uint8)
        x, x_t = (
            torch.zeros(1, most, config.language.width, dtype=dtype),
            torch.zeros(1, config.action_horizon, config.action_dim),
        )
        prefix = (self._weights["prefix"], x, torch.ones(1, dtype=torch.int32), torch.zeros(1, config.action_dim))
        past = self._traced_prefix(*prefix)  # as the program returns it
        open_prefix = torch.export.Dim("P", min=2, max=most)
        open_keys = torch.export.Dim("S", min=2, max=most + config.suffix_len)
        opened = {id(x): {1: open_prefix}, id(past.seen.bias): {2: open_keys}}
        opened |= {id(cache): {1: open_keys} for cache in (*past.k, *past.v)}
        step = _with_tensor(self._flow.steps(1)[0])
        work = {
            "vision": (self._traced_vision, (self._weights["vision"], image)),
            "prefix": (self._traced_prefix, prefix),
            "step": (self._traced_step, (self._weights["step"], step, past, x_t)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole.directory(path) as part:
                for name in tqdm(PROGRAMS, "compiling for this CPU, once", unit="program"):
                    _compile(_export(*work[name], opened), part / f"{name}.pt2")
        except UserError:
            if not path.exists():  # else another process was faster
                raise


class _Traced(torch.nn.Module):
    """A function of nested tuples as one of the tensors in them."""

    def __init__(self, function: Callable[..., Any], examples: tuple) -> None:
        super().__init__()
        self._function = function
        self._leaves, self._tree = pytree.tree_flatten(examples)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of what the function returns."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return _tensors(self._function(*pytree.tree_unflatten(leaves, self._tree)))


def _export(function: Callable[..., Any], examples: tuple, opened: dict[int, dict[int, Any]]) -> ExportedProgram:
    """A function traced with tensors like the examples, of which some have open sizes (by their `id`)."""
    tensors = _tensors(examples)
    shapes = tuple(opened.get(id(tensor)) for tensor in tensors)
    exported = torch.export.export(_Traced(function, examples), tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    assert not exported.constants and not exported.state_dict, "a weight that is no argument would be in the program"
    return exported


def _compile(exported: ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of one part of torch to another
        aoti_compile_and_package(exported, package_path=str(path))


def _open(path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path)).loader.boxed_run


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _changed(owner: Any, **attributes: Any) -> Any:
    """A copy that shares everything but these."""
    new = copy.copy(owner)
    vars(new).update(attributes)
    return new


def _with_tensor(step: Step) -> Step:
    """With the size of the step as a tensor, for a number would be part of the program."""
    return step._replace(dt=torch.tensor(step.dt))


def _place(flow: Flow) -> Path:
    """Where the programs of an architecture are, on this processor, with this torch and this code."""
    about = [repr(flow.config), flow.language.dtype, torch.__version__, torch.get_num_threads(), *_processor()]
    about += [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return host.cache() / "openpi_port" / "torch" / hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _processor() -> Iterable[str]:
    """What it can do."""
    info = Path("/proc/cpuinfo")
    flags = (
        sorted({line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))})
        if info.exists()
        else []
    )
    return [platform.machine(), platform.processor(), *flags]
