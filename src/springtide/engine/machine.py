"""What this machine, or the container round this process, lets us use: cores and memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, a container's quota, and OMP_NUM_THREADS where set."""
    limits: list[int] = [_affinity()]
    quota, _, period = _first_line(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        limits.append(max(1, int(quota) // int(period)))
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        limits.append(int(wanted))
    return min(limits)


def available_memory() -> int:
    """Bytes that can be taken without swapping: the system's estimate, and what a container's limit leaves."""
    limits = [_system_memory()]
    limit, used = _first_line(_CGROUP / "memory.max"), _first_line(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        # Files that were read count as used, but are given up: a model that was just checked or fetched, above all.
        cached = [_bytes_of(_CGROUP / "memory.stat", key) or 0 for key in ("inactive_file", "active_file")]
        limits.append(int(limit) - int(used) + sum(cached))
    return max(0, min(limits))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1


def _system_memory() -> int:
    available = _bytes_of(_MEMINFO, "MemAvailable:")
    if available is not None:
        return available
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes_of(path: Path, key: str) -> int | None:
    for line in _lines(path):
        name, value, *unit = line.split()
        if name == key:
            return int(value) * (1024 if unit == ["kB"] else 1)
    return None


def _first_line(path: Path) -> str:
    return next(iter(_lines(path)), "").strip()


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
