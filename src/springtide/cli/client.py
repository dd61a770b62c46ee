"""How commands reach a running platform: where it is (run.json), and its admin API."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec

from springtide.core.errors import SetupError, SpringtideError


class RunState(msgspec.Struct, kw_only=True):
    """What a running `up` says of itself in `<data_dir>/run.json`; `phase` and the numbers are its progress."""

    pid: int
    phase: str = "starting"
    done: int = 0
    total: int | None = None
    ready: bool = False
    url: str = ""
    fabric_url: str = ""
    model: str = ""
    note: str | None = None
    error: str | None = None
    hint: str | None = None

    def save(self, data_dir: Path) -> None:
        path = data_dir / "run.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(msgspec.json.encode(self))
        temporary.replace(path)

    @staticmethod
    def load(data_dir: Path) -> RunState | None:
        try:
            return msgspec.json.decode((data_dir / "run.json").read_bytes(), type=RunState)
        except (OSError, msgspec.DecodeError):
            return None


class DataDirLock:
    """One platform per data dir: a lock that the kernel drops when its holder dies, however it dies."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "lock"
        self._file: IO[str] | None = None

    def acquire(self, patience: float = 0.5) -> bool:
        """Whether it is ours now. Patient with those who just look whether somebody holds it."""
        self._file = open(self._path, "a")  # noqa: SIM115  # held until release
        deadline = time.monotonic() + patience
        while not self._try(fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                self.release()
                return False
            time.sleep(0.01)
        return True

    def is_held(self) -> bool:
        """Whether some process holds it. Those who look don't take one another for a holder."""
        with open(self._path, "a") as self._file:
            free = self._try(fcntl.LOCK_SH)
        self._file = None
        return not free

    def _try(self, kind: int) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def is_running(data_dir: Path) -> bool:
    """Whether some process holds the data dir's lock."""
    return (data_dir / "lock").exists() and DataDirLock(data_dir).is_held()


def running(data_dir: Path) -> RunState:
    """The platform that runs on this data dir.

    Raises:
        SetupError: none does.
    """
    state = RunState.load(data_dir) if is_running(data_dir) else None
    if state is None:
        raise SetupError(f"no platform runs on {data_dir}", hint="start one with: springtide up")
    return state


class AdminClient:
    """The admin API of a running platform, on loopback, with the token that its owner can read."""

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=30, trust_env=False
        )

    @classmethod
    def of(cls, data_dir: Path) -> AdminClient:
        running(data_dir)
        try:
            url = (data_dir / "admin.url").read_text().strip()  # a gateway that was started again has another
            token = (data_dir / "admin.token").read_text().strip()
        except FileNotFoundError:
            raise SetupError(
                "the gateway is not up", hint="is it still starting? see the logs in its data dir"
            ) from None
        except OSError as error:
            raise SetupError(
                f"the admin token can't be read: {error}", hint="run as the user who started the platform"
            ) from None
        return cls(url, token)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded answer.

        Raises:
            SpringtideError: the API refused, in its words; or it can't be reached.
        """
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise SpringtideError(
                f"the admin API does not answer: {error}", hint="is it still starting? see: springtide status"
            ) from None
        if response.is_error:
            raise SpringtideError(_message(response))
        return response.json() if response.content else None


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the admin API answered {response.status_code}: {response.text[:200]}"
