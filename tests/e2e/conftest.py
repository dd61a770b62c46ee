"""A whole platform, as a user starts it, and what is needed to hurt it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from springtide.cli.lab.fleet import processes_that_name

SPRINGTIDE = [sys.executable, "-m", "springtide.cli.main"]
MODELS = os.environ.get("SPRINGTIDE_TEST_MODELS", str(Path.home() / ".cache" / "springtide-test" / "models"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, patience: float = 60.0) -> Any:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {patience:.0f} s: {what}")


def processes_of(directory: Path) -> dict[int, str]:
    """Living processes whose command line names `directory`: pid -> command line."""
    return dict(processes_that_name(str(directory)))


class Platform:
    """`springtide up` in the foreground, in a process of its own."""

    def __init__(self, data_dir: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [*SPRINGTIDE, "up", "--data-dir", str(data_dir), "--port", str(self.port), *flags]
        self.output = data_dir.parent / f"{data_dir.name}.up.log"
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, "SPRINGTIDE_MODEL_DIR": MODELS, **(env or {})},
                start_new_session=True,
            )

    def ready(self, patience: float = 120.0) -> Platform:
        def up() -> bool:
            assert self.process.poll() is None, self.said()
            return "Ctrl-C ends it all." in self.said()

        try:
            wait_until(up, "the platform is up", patience)
        except AssertionError:
            print(self.said(), self.logs())
            raise
        return self

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def logs(self) -> str:
        files = sorted((self.data_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)

    @property
    def key(self) -> str:
        return (self.data_dir / "api_key").read_text().strip()

    def run(self, *arguments: str, check: bool = True) -> str:
        """A `springtide` command against this platform; its stdout."""
        result = subprocess.run(
            [*SPRINGTIDE, *arguments, "--data-dir", str(self.data_dir)], capture_output=True, text=True, timeout=60
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def status(self) -> dict[str, Any]:
        return json.loads(self.run("status", "--json"))

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=60, trust_env=False, **options
        )

    def pids(self, word: str) -> list[int]:
        """Processes of this platform with `word` in their command line."""
        return [pid for pid, line in processes_of(self.data_dir).items() if word in line]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith((name + " ", name + "{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in processes_of(self.data_dir):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Callable[..., Platform]]:
    """Starts platforms on data dirs below tmp_path, and ends them."""
    started: list[Platform] = []

    def start(*flags: str, name: str = "data", env: dict[str, str] | None = None) -> Platform:
        started.append(Platform(tmp_path / name, *flags, env=env))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """One platform with a mock engine of 10 ms steps, for tests that leave it as it was."""
    one = Platform(tmp_path_factory.mktemp("mock") / "data", *mock_flags())
    try:
        yield one.ready()
    finally:
        one.stop()


def mock_flags(*, step_ms: float = 10, replicas: int = 1, **options: object) -> list[str]:
    """Flags for a platform with mock replicas."""
    values = {"step_base_ms": step_ms, "step_per_seq_ms": 0, "prefill_tok_s": 0, **options}
    pairs = [part for key, value in values.items() for part in ("-o", f"{key}={value}")]
    return ["--engine", "mock", "--model", "mock", "--replicas", str(replicas), *pairs]


def events(response: httpx.Response) -> Iterator[dict[str, Any] | str]:
    """SSE data of a streaming response: decoded, or "[DONE]"."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield "[DONE]" if line == "data: [DONE]" else json.loads(line[6:])
