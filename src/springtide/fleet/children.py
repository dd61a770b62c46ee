"""Child processes that never outlive us. Knows processes, pipes and signals; nothing of what the children do.

A child holds the reading end of a pipe whose writing end only its parent has. The kernel closes that end when the
parent dies, however it dies, and the child's `watch_parent` sees the end of the file. On Linux the kernel also
sends it a SIGTERM (PR_SET_PDEATHSIG), should another process have inherited the writing end. A child has its own
session, so that a terminal's Ctrl-C reaches the parent alone, which then stops its children in order.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

PARENT_FD = "SPRINGTIDE_PARENT_FD"
_PR_SET_PDEATHSIG = 1
_MAX_LOG_BYTES = 4 * 2**20  # looked at when a child starts; one older file is kept


class Child:
    """A child process. `log_path` holds what it wrote to stdout and stderr. Methods may be called after its end."""

    def __init__(self, process: subprocess.Popen[bytes], parent_fd: int, log_path: Path, log_start: int) -> None:
        self._process = process
        self._parent_fd: int | None = parent_fd
        self._log_start = log_start
        self.log_path = log_path

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code (minus the signal that ended it), or None while it runs."""
        code = self._process.poll()
        if code is not None:
            self.abandon()
        return code

    def wait(self, timeout: float) -> int | None:
        """The exit code, or None if it still runs after `timeout` seconds. Blocks."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return self.poll()

    def terminate(self) -> None:
        """Ask it to end when it has finished what it does (SIGTERM)."""
        self._process.terminate()

    def abandon(self) -> None:
        """Let it believe that its parent is gone: it ends at once, though in order."""
        if self._parent_fd is not None:
            os.close(self._parent_fd)
            self._parent_fd = None

    def last_words(self) -> str:
        """Why it ended: its last `error:` line with the `hint:` after it, else the last line that it wrote, else
        the signal or the exit code."""
        lines = self._log_lines()
        for at in reversed(range(len(lines))):
            if lines[at].startswith("error: "):
                hint = lines[at + 1] if at + 1 < len(lines) and lines[at + 1].startswith("hint: ") else ""
                return lines[at].removeprefix("error: ") + (f" ({hint.removeprefix('hint: ')})" if hint else "")
        code = self.poll()
        if code is not None and code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return lines[-1][:500] if lines else f"ended with code {code}"

    def _log_lines(self) -> list[str]:
        """The last lines that this child, not one before it, wrote."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - 8192))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line.strip() for line in text.splitlines() if line.strip()]

    def kill_group(self) -> None:
        """SIGKILL to it and to whatever else is left of its session."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left (macOS says so by refusing)


def start_child(arguments: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None) -> Child:
    """Start a process that ends when we do, if it calls `watch_parent`. `env` is its whole environment (default:
    ours). Call it in the main thread: Linux takes the end of the starting thread for that of the parent.

    Raises:
        OSError: the program can't be run or the log can't be written.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    _rotate(log_path)
    theirs, ours = os.pipe()
    try:
        with log_path.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**(os.environ if env is None else env), PARENT_FD: str(theirs)},
                pass_fds=(theirs,),
                start_new_session=True,
            )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return Child(process, ours, log_path, log_start)


def watch_parent(on_gone: Callable[[], object], *, exit_after: float = 5.0) -> bool:
    """In a child: call `on_gone` once the parent is gone, in a thread of its own (asyncio: pass a function that
    uses `call_soon_threadsafe`). Should the process still be there `exit_after` seconds later, it is ended.

    Returns:
        False if this process was not started by `start_child`: there is nobody to watch.
    """
    descriptor = os.environ.pop(PARENT_FD, None)
    if descriptor is None:
        return False
    fd = int(descriptor)
    os.set_inheritable(fd, False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def wait_for_the_end() -> None:
        while os.read(fd, 64):
            pass  # nobody writes; only the end of the file matters
        logger.warning("the parent process is gone; leaving")
        try:
            on_gone()
            time.sleep(exit_after)
        finally:
            os._exit(1)

    threading.Thread(target=wait_for_the_end, name="watch-parent", daemon=True).start()
    return True


def _rotate(log_path: Path) -> None:
    if log_path.exists() and log_path.stat().st_size > _MAX_LOG_BYTES:
        log_path.replace(log_path.with_name(log_path.name + ".1"))
