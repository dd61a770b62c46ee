"""What this machine computes on: its CPU, and CUDA cards as far as their driver's own tool tells."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from springtide.core.cluster import Device

_TIMEOUT = 10.0  # a driver that was asleep takes seconds to answer


def find_devices() -> list[Device]:
    """The CPU first, then the cards. May take seconds."""
    return [_cpu(), *_cuda_cards()]


def _cpu() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(kind="cpu", name=_cpu_name(), memory=memory, cores=cores)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cuda_cards() -> list[Device]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # a driver that does not answer can't compute either
    return parse_cards(answer)


def parse_cards(answer: str) -> list[Device]:
    """The cards in nvidia-smi's answer: lines of name, memory in MiB. Memory that it can't tell counts as 0."""
    cards = []
    for line in answer.splitlines():
        name, separator, mebibytes = line.rpartition(",")
        if separator:
            memory = int(mebibytes) * 2**20 if mebibytes.strip().isdigit() else 0
            cards.append(Device(kind="cuda", name=name.strip(), memory=memory))
    return cards
