"""How fast frames travel: one gateway process receives what one replica process emits, through a real NATS server.

    python benchmarks/fabric_streams.py [--streams 64] [--steps 1500] [--runs 5] [--json FILE]

Each step gives every stream one frame with one delta of one token, and is one message, as in an engine step.
Rates are of the receiving process: by the wall clock (sender, server and receiver share this machine's cores)
and by its own CPU time (what one gateway core could take). Medians over the runs.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from springtide.core.request import Delta, End, Request, SamplingParams, TokenCounts
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.server import NatsServer, find_nats_server
from springtide.fabric.streams import StreamHub, StreamKey, StreamServer

GOAL = 100_000  # deltas per second in one receiving process


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority.open(Path(directory) / "authority")
        server = NatsServer(Path(directory) / "nats", authority)
        server.start()
        try:
            runs = _measure(authority, server.url, options)
        finally:
            server.stop()
    report = _report(runs, options, _server_version())
    _print(report)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _measure(authority: Authority, url: str, options: argparse.Namespace) -> list[dict[str, float]]:
    replica = multiprocessing.get_context("spawn").Process(
        target=_replica_process, args=(authority.local_node("bench", [url]), options.streams, options.steps)
    )
    replica.start()
    try:
        return uvloop.run(_gateway(authority.platform_credentials("gateway", [url]), options))
    finally:
        replica.terminate()
        replica.join()


# The sending side.


def _replica_process(credentials: Credentials, streams: int, steps: int) -> None:
    uvloop.run(_replica(credentials, streams, steps))


async def _replica(credentials: Credentials, streams: int, steps: int) -> None:
    """Waits until all streams of a run are open, then emits as fast as it can."""
    fabric = await Fabric.connect(credentials, name="replica")
    opened: asyncio.Queue[StreamKey] = asyncio.Queue()
    server = StreamServer(
        fabric,
        "bench",
        "replica",
        on_open=lambda key, request, gateway, turn: opened.put_nowait(key),
        on_cancel=lambda key: None,
        max_bytes=2**30,
    )
    await server.start()
    while True:
        keys = [await opened.get() for _ in range(streams)]
        for key in keys:
            server.emit(key, [])
        for step in range(steps):
            for key in keys:
                server.emit(key, [Delta(0, "text", b" token", [step], 6 * step)])
            await server.flush()
            await asyncio.sleep(0)  # as after every engine step: each leaves by itself, not in one burst
        for key in keys:
            server.emit(key, [], End("finished", TokenCounts(1, steps)))
        await server.flush()


# The receiving side.


async def _gateway(credentials: Credentials, options: argparse.Namespace) -> list[dict[str, float]]:
    fabric = await Fabric.connect(credentials, name="gateway")
    hub = StreamHub(fabric, "bench")
    await hub.start()
    await _run(hub, options, 0)  # a first run warms up
    results = [await _run(hub, options, number) for number in range(1, options.runs + 1)]
    await hub.close()
    await fabric.close()
    return results


async def _run(hub: StreamHub, options: argparse.Namespace, number: int) -> dict[str, float]:
    lost_before = hub.counters["gaps"]
    cpu, began = time.process_time(), time.perf_counter()
    counts = await asyncio.gather(*(_read(hub, f"run-{number}-{index}") for index in range(options.streams)))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    deltas = sum(deltas for deltas, _ in counts)
    assert deltas == options.streams * options.steps, "frames were lost"
    return {
        "deltas_s": deltas / wall,
        "deltas_cpu_s": deltas / cpu,
        "frames_per_wakeup": deltas / sum(wakeups for _, wakeups in counts),
        "gaps": hub.counters["gaps"] - lost_before,
    }


async def _read(hub: StreamHub, request_id: str) -> tuple[int, int]:
    """Deltas of a whole stream, and how often its reader was woken."""
    request = Request(id=request_id, model="m", tenant="t", sampling=SamplingParams(), prompts=("hello",))
    stream = await hub.open(request, 1, "bench", "replica")
    deltas = wakeups = 0
    while True:
        frames = await stream.frames()
        wakeups += 1
        deltas += sum(len(frame.deltas) for frame in frames)
        if frames[-1].end is not None:
            return deltas, wakeups


# The report.


def _report(runs: list[dict[str, float]], options: argparse.Namespace, server_version: str) -> dict[str, Any]:
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    figures = [
        {
            "name": "deltas received per second and gateway process (its own CPU time)",
            "value": round(median["deltas_cpu_s"]),
            "unit": "deltas/s",
            "goal": GOAL,
            "holds": median["deltas_cpu_s"] >= GOAL,
        },
        {
            "name": "deltas received per second, all processes on this machine",
            "value": round(median["deltas_s"]),
            "unit": "deltas/s",
            "goal": GOAL,
            "holds": median["deltas_s"] >= GOAL,
        },
    ]
    versions = {name: version(name) for name in ("nats-py", "msgspec", "uvloop")}
    return {
        "device": _cpu_name(),
        "versions": {"python": platform.python_version(), "nats-server": server_version, **versions},
        "streams": options.streams,
        "steps": options.steps,
        "median": median,
        "runs": runs,
        "figures": figures,
    }


def _print(report: dict[str, Any]) -> None:
    print(f"{report['device']}; {', '.join(f'{name} {number}' for name, number in report['versions'].items())}")
    print(f"{report['streams']} streams, {report['steps']} steps, one token a frame\n")
    print(f"{'run':>6} {'deltas/s':>10} {'deltas/CPU s':>13} {'frames a wake-up':>17} {'gaps':>5}")
    for number, run in [*enumerate(report["runs"], 1), ("median", report["median"])]:
        print(
            f"{number:>6} {run['deltas_s']:>10,.0f} {run['deltas_cpu_s']:>13,.0f} "
            f"{run['frames_per_wakeup']:>17.2f} {run['gaps']:>5.0f}"
        )
    print()
    for figure in report["figures"]:
        print(f"{figure['name']}: {figure['value']:,} (goal {figure['goal']:,}): {'yes' if figure['holds'] else 'NO'}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _server_version() -> str:

    text = subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True).stdout
    return text.rsplit("v", 1)[1].strip()


if __name__ == "__main__":
    main()
