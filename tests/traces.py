"""The intermediate tensors of a model on the CPU, for tests of the parity report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from convert import parity_rows, tables
from openpi_port.backends import Backend
from openpi_port.config import Compute, Pi0, Pi0Fast

TOLERANCE = parity_rows.TOLERANCE["float32"]


class Traced(NamedTuple):
    """A filled model in one framework."""

    backend: Backend
    module: Any


def side(config: Pi0 | Pi0Fast, weights: Mapping[str, np.ndarray], name: str) -> Traced:
    """A model in one framework, filled with canonical weights."""
    backend = Backend(name)
    weights = tables.translate(weights, config, "flax", name)
    return Traced(backend, backend.infer.load(config, weights, Compute(), "cpu").module)


def traced(one: Traced, batch: Mapping[str, Any], part: str = "forward") -> dict[str, np.ndarray]:
    """All that a part of the report compares, by name."""
    with one.backend.device.precision(Compute()):
        return dict(getattr(one.backend.trace, part)(one.module, batch))
