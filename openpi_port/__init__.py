"""The pi0 family of robot policies: a Flax reference beside a PyTorch mirror."""

from __future__ import annotations

from openpi_port.errors import UserError
from openpi_port.loading import load_model
from openpi_port.policy import Policy

__all__ = ["Policy", "UserError", "load_model"]
