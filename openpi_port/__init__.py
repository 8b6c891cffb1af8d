"""The pi0 family of robot policies: a Flax reference beside a PyTorch mirror."""

from __future__ import annotations

from openpi_port.errors import UserError
from openpi_port.loading import load_model

__all__ = ["UserError", "load_model"]
