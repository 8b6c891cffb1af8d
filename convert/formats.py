"""Every checkpoint format by its function; the work is in one small file per origin."""

from __future__ import annotations

from convert.openpi import read as read_openpi

__all__ = ["read_openpi"]
