"""How commands find out whether a platform runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from springtide.cli.client import DataDirLock, is_running


def test_only_who_holds_the_lock_counts_as_running(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    lock = DataDirLock(tmp_path)
    assert lock.acquire() and is_running(tmp_path)
    assert not DataDirLock(tmp_path).acquire(patience=0)
    assert is_running(tmp_path)  # the one that tried in vain took nothing away
    lock.release()
    assert not is_running(tmp_path)


def test_looking_hinders_nobody(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    done = threading.Event()

    def look() -> bool:
        seen = False
        while not done.is_set():
            seen = seen or is_running(tmp_path)
        return seen

    with ThreadPoolExecutor(2) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        done.wait(0.3)
        done.set()
        assert not any(seen.result() for seen in looking)  # of each other

        done.clear()
        looking = [pool.submit(look) for _ in range(2)]
        for _ in range(20):
            lock = DataDirLock(tmp_path)
            assert lock.acquire(patience=5)
            lock.release()
        done.set()
        assert all(seen.result() in (True, False) for seen in looking)
