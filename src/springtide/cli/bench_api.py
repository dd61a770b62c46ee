"""What the platform adds to an engine: a mock whose step times are known, real fabric, gateway and HTTP.

The load comes from another process over raw sockets, so that the client costs little; on a small machine it
still shares the cores with all that it measures. So beside the rates stand the CPU seconds that the gateway
process itself used.

Added latency is the time to the first token less what the mock's law takes: one step where the engine is idle;
among other streams, one step and the wait for its beginning, which for arrivals at random is half a step in the
median and a whole one at worst.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.console import Console
from rich.table import Table

from springtide.core.figures import Figure, cpu_name, figure, versions, write_json

STEP_MS = 20.0  # a step of the mock, and so a token of each stream, where latency is measured


class Load(NamedTuple):
    """`streams` connections with one request after the other, `pause_ms` at most in between, of `tokens` tokens."""

    streams: int
    tokens: int
    step_ms: float
    pause_ms: float


LATENCY = [Load(streams, 15, STEP_MS, 2 * STEP_MS) for streams in (1, 32, 200)]
# With the role and the finish, 15 tokens are 17 SSE chunks, as in the marks that others publish.
BACK_TO_BACK = [Load(1, 15, 0.0, 0.0), Load(64, 15, 0.0, 0.0), Load(64, 254, 0.0, 0.0)]


class _Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection that sends the same request over and over."""

    def __init__(self, request: bytes, pause: float, until: float, result: _Result) -> None:
        self._request, self._pause, self._until, self._result = request, pause, until, result
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._body, self._first, self._chunks = b"", 0.0, 0
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._first and b'"delta":{"content":"' in data:  # the role's chunk is not the first token
            self._first = time.perf_counter()
        self._chunks += data.count(b"data: {")
        self._body = (self._body + data)[-64:]
        if self._body.endswith(b"0\r\n\r\n"):
            self._finish(b"[DONE]" in self._body)

    def _finish(self, ok: bool) -> None:
        now = time.perf_counter()
        if ok:
            self._result.add(self._first - self._sent, now - self._sent, self._chunks)
        else:
            self._result.failed += 1
        if now < self._until and ok:
            if self._pause:
                asyncio.get_running_loop().call_later(random.uniform(0, self._pause), self._send)
            else:
                self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


class _Result:
    def __init__(self) -> None:
        self.first: list[float] = []
        self.whole: list[float] = []
        self.chunks = 0
        self.failed = 0

    def add(self, first: float, whole: float, chunks: int) -> None:
        self.first.append(first)
        self.whole.append(whole)
        self.chunks += chunks


def _load(port: int, request: bytes, load: Load, seconds: float, out: Any) -> None:
    """The client process."""
    import uvloop

    async def main() -> _Result:
        result, until = _Result(), time.perf_counter() + seconds
        loop = asyncio.get_running_loop()
        made = [
            await loop.create_connection(
                lambda: _Connection(request, load.pause_ms / 1000, until, result), "127.0.0.1", port
            )
            for _ in range(load.streams)
        ]
        await asyncio.wait_for(asyncio.gather(*(protocol.closed for _, protocol in made)), seconds + 30)
        return result

    started = time.perf_counter()
    result = uvloop.run(main())
    out.send((time.perf_counter() - started, result))


def _request(key: str, model: str, tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return (head + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body


@contextmanager
def _platform(step_ms: float, max_num_seqs: int) -> Iterator[tuple[int, str, int]]:
    """A whole platform with a mock engine: (port, key, pid of the gateway)."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as directory:
        base = [sys.executable, "-m", "springtide.cli.main"]
        options = [f"step_base_ms={step_ms}", "step_per_seq_ms=0", "prefill_tok_s=0", f"max_num_seqs={max_num_seqs}"]
        command = [*base, "up", "--detach", "--engine", "mock", "--model", "mock", "--port", str(port)]
        command += [*(part for option in options for part in ("-o", option)), "--data-dir", directory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        try:
            yield port, (Path(directory) / "api_key").read_text().strip(), _gateway_pid(directory)
        finally:
            subprocess.run([*base, "down", "--data-dir", directory], check=True, stdout=subprocess.DEVNULL)


def _gateway_pid(directory: str) -> int:
    """The gateway of the platform in `directory`, found by its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"gateway" in line and directory.encode() in line:
                return int(entry.name)
    raise RuntimeError("the gateway process is not there")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _measure(port: int, key: str, pid: int, load: Load, seconds: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    client = context.Process(target=_load, args=(port, _request(key, "mock", load.tokens), load, seconds, send))
    before = _cpu_seconds(pid)
    client.start()
    if not receive.poll(seconds + 60):
        client.kill()
        raise RuntimeError("the load client did not end")
    wall, result = receive.recv()
    client.join()
    cpu = _cpu_seconds(pid) - before
    requests = len(result.first)
    return {
        "streams": load.streams,
        "tokens": load.tokens,
        "step_ms": load.step_ms,
        "requests": requests,
        "failed": result.failed,
        "requests_s": requests / wall,
        "chunks_s": result.chunks / wall,
        "tokens_per_chunk": requests * load.tokens / max(1, result.chunks),
        "ttft_ms": [x * 1000 for x in result.first],
        "whole_ms": [x * 1000 for x in result.whole],
        "gateway_cpu_ms_per_request": cpu * 1000 / max(1, requests),
        "requests_per_gateway_cpu_s": requests / max(cpu, 1e-9),
        "chunks_per_gateway_cpu_s": result.chunks / max(cpu, 1e-9),
    }


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run(seconds: float, runs: int, json_file: Path | None) -> None:
    """Measure, print the table, write the JSON."""
    rows: list[dict[str, Any]] = []
    for loads in (BACK_TO_BACK, LATENCY):
        with _platform(loads[0].step_ms, max_num_seqs=512) as (port, key, pid):
            _measure(port, key, pid, loads[0]._replace(streams=8), 2.0)  # warm-up
            for load in loads:
                rows.append(_row(_median_run([_measure(port, key, pid, load, seconds) for _ in range(runs)])))
    figures = _figures(rows)
    _print(rows, figures)
    result = {
        "bench": "api",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions("granian", "nats-py", "msgspec", "uvloop"),
        "runs": runs,
        "seconds": seconds,
        "rows": rows,
    }
    write_json(json_file, result, figures)


def _median_run(measured: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(measured, key=lambda m: m["requests_s"])[len(measured) // 2]


def _row(measured: dict[str, Any]) -> dict[str, Any]:
    """Percentiles in place of samples, less what the law takes."""
    first, whole, step = measured.pop("ttft_ms"), measured.pop("whole_ms"), measured["step_ms"]
    alone = measured["streams"] == 1
    after = statistics.median(whole) - statistics.median(first)
    return {
        **{key: round(value, 3) if isinstance(value, float) else value for key, value in measured.items()},
        "added_ttft_ms_p50": round(statistics.median(first) - step * (1.0 if alone else 1.5), 3),
        "added_ttft_ms_p99": round(_percentile(first, 0.99) - step * (1.0 if alone else 2.0), 3),
        "added_tpot_ms_p50": round(after / (measured["tokens"] - 1) - step, 3),
        "whole_ms_p50": round(statistics.median(whole), 3),
    }


def _figures(rows: list[dict[str, Any]]) -> list[Figure]:
    one, short, long = rows[:3]
    return [
        figure("added latency p50 at 1 stream, back to back", one["added_ttft_ms_p50"], "ms", 2.0, better="lower"),
        figure("requests/s of 17 chunks, one gateway, all on these cores", short["requests_s"], "1/s", 4000),
        figure("requests of 17 chunks per CPU second of the gateway", short["requests_per_gateway_cpu_s"], "1/s", 4000),
        figure("SSE chunks/s, one gateway, all on these cores", long["chunks_s"], "1/s", 100_000),
        figure("SSE chunks per CPU second of the gateway", long["chunks_per_gateway_cpu_s"], "1/s", 100_000),
    ]


def _print(rows: list[dict[str, Any]], figures: list[Figure]) -> None:
    table = Table(title=f"API over a mock engine, {cpu_name()}, {os.cpu_count()} cores shared with the client")
    columns = {
        "streams": "streams",
        "tokens": "tokens",
        "step_ms": "step ms",
        "requests_s": "req/s",
        "chunks_s": "chunks/s",
        "tokens_per_chunk": "tok/chunk",
        "added_ttft_ms_p50": "added p50",
        "added_ttft_ms_p99": "p99 ms",
        "added_tpot_ms_p50": "per token",
        "gateway_cpu_ms_per_request": "gateway CPU ms/req",
        "failed": "failed",
    }
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(_shown(row[key]) for key in columns))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for entry in figures:
        console.print(
            f"{'holds' if entry.holds else 'FALLS SHORT'}: {entry.name}: {entry.value} {entry.unit} ({entry.goal})"
        )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.2f}"
