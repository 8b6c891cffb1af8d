"""Comparing the tensors that are there with those that should be."""

from __future__ import annotations

from collections.abc import Mapping

from openpi_port.errors import UserError, near

Shapes = Mapping[str, tuple[int, ...]]


def check(found: Shapes, wanted: Shapes, where: str) -> None:
    """Accepts only the same names with the same shapes.

    Args:
      found: name -> shape in the file or mapping.
      wanted: name -> shape that the model needs.
      where: what the message calls the former.

    Raises:
      UserError: names the first missing, unknown and misshapen tensors and their nearest candidates.
    """
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted]
    misshapen = [n for n in wanted if n in found and tuple(found[n]) != tuple(wanted[n])]
    problems = [f"missing {n} ({near(n, extra, 2) if extra else 'nothing is left over'})" for n in missing[:3]]
    problems += [f"unknown {n} ({near(n, missing or wanted, 2)})" for n in extra[:3]]
    problems += [f"{n} is {tuple(found[n])}, not {tuple(wanted[n])}" for n in misshapen[:3]]
    if problems:
        counts = f"{len(missing)} missing, {len(extra)} unknown, {len(misshapen)} misshapen"
        raise UserError(f"{where}: the tensors don't fit the model, {counts}: " + "; ".join(problems))
