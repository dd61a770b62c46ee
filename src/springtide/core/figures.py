"""What every benchmark says of itself: the machine, the versions, and each goal with the figure that was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One goal. `holds` is None, with a `reason`, where it could not be measured."""

    name: str
    value: float | None
    unit: str
    goal: str
    holds: bool | None
    reason: str | None = None


def figure(name: str, value: float, unit: str, goal: float, *, better: Literal["higher", "lower"] = "higher") -> Figure:
    """A figure that was measured, held against its goal."""
    holds = value >= goal if better == "higher" else value <= goal
    sign = ">=" if better == "higher" else "<="
    return Figure(name=name, value=round(value, 4), unit=unit, goal=f"{sign} {goal:g}", holds=holds)


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the named packages, where installed."""
    found = {"python": platform.python_version()}
    for package in ("springtide", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path | None, result: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Write a benchmark's result with its figures, if a path was asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "figures": [msgspec.to_builtins(f) for f in figures]}, indent=2) + "\n")
