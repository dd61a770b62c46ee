"""Children do not outlive their parent, however it ends, and say why they ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from springtide.fleet import children
from springtide.fleet.children import start_child

ASYNC_CHILD = """
import asyncio, signal, sys
from springtide.fleet.children import watch_parent

async def main():
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    assert watch_parent(lambda: loop.call_soon_threadsafe(stop.set))
    loop.add_signal_handler(signal.SIGTERM, print, "asked to end")
    print("watching", flush=True)
    await stop.wait()
    print("left in order", flush=True)

asyncio.run(main())
"""

PARENT = """
import sys, time
from pathlib import Path
from springtide.fleet.children import start_child
child = start_child([sys.executable, "-c", sys.argv[1]], log_path=Path(sys.argv[2]))
print(child.pid, flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool], patience: float = 20.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@contextlib.contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """SIGKILL at the end of the block, however it ends."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return not exists(pid)


def test_a_child_leaves_when_its_parent_is_killed(tmp_path: Path):
    log = tmp_path / "child.log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, ASYNC_CHILD, str(log)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout, killed(parent):
        pid = int(parent.stdout.readline())
        wait_until(lambda: "watching" in log.read_text())
    wait_until(lambda: has_ended(pid))
    assert "left in order" in log.read_text()


def test_an_abandoned_child_leaves_too(tmp_path: Path):
    child = start_child([sys.executable, "-c", ASYNC_CHILD], log_path=tmp_path / "logs" / "child.log")
    wait_until(lambda: "watching" in child.log_path.read_text())
    assert child.poll() is None and child.wait(0.01) is None
    child.abandon()
    assert child.wait(20) == 0
    child.terminate()  # harmless afterwards, all of them
    child.abandon()
    child.kill_group()


def test_a_process_that_nobody_started_as_a_child_watches_nobody():
    assert not children.watch_parent(lambda: pytest.fail("there is no parent to lose"))


def test_killing_takes_the_whole_session(tmp_path: Path):
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    child = start_child([sys.executable, "-c", script], log_path=tmp_path / "child.log")
    wait_until(lambda: child.log_path.read_text().strip().isdigit())
    grandchild = int(child.log_path.read_text())
    child.kill_group()
    assert child.wait(20) == -signal.SIGKILL
    wait_until(lambda: has_ended(grandchild))
    assert child.last_words() == "ended by SIGKILL"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('error: no model'); print('hint: pull it first'); raise SystemExit(1)", "no model (pull it first)"),
        ("print('error: no model'); raise SystemExit(1)", "no model"),
        ("raise ValueError('spilt milk')", "ValueError: spilt milk"),
        ("raise SystemExit(3)", "ended with code 3"),
    ],
)
def test_last_words_say_why_it_ended(tmp_path: Path, script: str, words: str):
    log = tmp_path / "child.log"
    log.write_text("error: of a child before this one\n")
    child = start_child([sys.executable, "-c", script], log_path=log)
    assert child.wait(20)
    assert child.last_words() == words


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(children, "_MAX_LOG_BYTES", 100)
    log = tmp_path / "child.log"
    log.write_text("old " * 50)
    start_child([sys.executable, "-c", "print('new')"], log_path=log).wait(20)
    assert log.read_text() == "new\n"
    assert (tmp_path / "child.log.1").read_text().startswith("old")
