"""One listening address, served by granian inside our own event loop. Knows ASGI, ports and certificates.

Why HTTP/1.1 only: there the server bounds the time that a connection may take for its first header and between
requests, and lets running responses finish when it stops; with protocol detection it does neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.server.embed import Server

from springtide.core.errors import SetupError
from springtide.gateway.http import Receive, Scope, Send
from springtide.gateway.limits import Limits

Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_START_PATIENCE_S = 10.0
_SPARE_FILES = 256


class Certificate:
    """A TLS certificate and its key, as PEM files that were found to be right."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Raises SetupError: a file is missing, is no PEM, or the two don't belong together."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
        except OSError as error:  # ssl.SSLError is one
            raise SetupError(
                f"the TLS files {cert} and {key} can't be used: {error}",
                hint="tls_cert takes a PEM certificate chain, tls_key its unencrypted PEM key",
            ) from None
        self.cert, self.key = cert, key


class Listener:
    """Serves `app` on `host`:`port` (0: a free one) between `start` and `wait_closed`."""

    def __init__(
        self, app: Application, host: str, port: int, *, limits: Limits, certificate: Certificate | None = None
    ) -> None:
        self._app = app
        self._host = host
        self._wanted_port = port
        self._limits = limits
        self._certificate = certificate
        self._reserved: socket.socket | None = None
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The base URL under which others reach it, as far as we can know."""
        host = socket.gethostname() if self._host in ("0.0.0.0", "::") else self._host
        scheme = "https" if self._certificate is not None else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def port(self) -> int:
        assert self._reserved is not None
        port: int = self._reserved.getsockname()[1]
        return port

    async def start(self) -> None:
        """Accepts connections when this returns.

        Raises:
            SetupError: the address is in use, not ours, or not allowed.
        """
        _raise_file_limit(self._limits.connections + _SPARE_FILES)
        self._reserved = _reserve(self._host, self._wanted_port)
        self._server = self._make_server(self.port)
        self._serving = asyncio.create_task(self._server.serve(), name=f"http {self.port}")
        try:
            async with asyncio.timeout(_START_PATIENCE_S):
                await self._until_accepting()
        except (TimeoutError, OSError) as error:
            await self.wait_closed(0)
            raise SetupError(f"can't serve on {self._host}:{self._wanted_port}: {error}") from None

    def close(self) -> None:
        """Accept no more. Responses under way go on."""
        if self._server is not None:
            self._server.stop()  # type: ignore[no-untyped-call]

    async def wait_closed(self, timeout: float) -> None:
        """After `close`: wait for the responses under way, at most `timeout` seconds, then cut them."""
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=timeout)
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._reserved is not None:
            self._reserved.close()

    def _make_server(self, port: int) -> Server:
        limits, certificate = self._limits, self._certificate
        return Server(
            self._app,
            address=self._host,
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            backlog=1024,
            backpressure=limits.connections,  # the default of 128 idle connections would shut everybody out
            http1_settings=HTTP1Settings(
                header_read_timeout=int(limits.header_timeout * 1000), max_buffer_size=limits.header_bytes
            ),
            log_enabled=False,
            ssl_cert=certificate.cert if certificate is not None else None,
            ssl_key=certificate.key if certificate is not None else None,
            ssl_protocol_min=SSLProtocols.tls12,
        )

    async def _until_accepting(self) -> None:
        assert self._serving is not None
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        while True:
            if self._serving.done():
                raise OSError(self._serving.exception() or "the server ended at once")
            with contextlib.suppress(ConnectionRefusedError):
                _, writer = await asyncio.open_connection(host, self.port)
                writer.close()
                return
            await asyncio.sleep(0.01)


def _reserve(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that it stays ours; the server binds it once more, and listens.

    The first, exclusive attempt finds whoever listens there already: the server itself would share the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        reserved = socket.socket(family)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))
        return reserved
    except OSError as error:
        raise SetupError(
            f"can't listen on {host}:{port}: {error.strerror or error}",
            hint="stop what uses it, or choose another with --port (PORT=... for make up)",
        ) from None


def _raise_file_limit(wanted: int) -> None:
    """Each connection is an open file; the usual soft limit of 1,024 is far below what we accept."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
