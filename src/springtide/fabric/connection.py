"""One connection of one process to the fabric, for as long as the process lives.

Where the credentials name several servers, any of them will do, and the others are tried first when one is gone. A
server that answers nothing (stopped, or behind a cut cable) counts as gone after one and a half seconds. The
connection comes back for ever, also where nats-py gives up (a token that ended, a refusal): then a new client takes its
place and every subscription moves over. Delivery is at most once, as in core NATS; the protocols above repair
what is lost, and are told when the connection is back. Permission errors are logged once each and counted.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import Client, Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.aio.transport import TcpTransport
from nats.js import JetStreamContext

from springtide.core.errors import SetupError
from springtide.fabric.credentials import Credentials
from springtide.fabric.kv import create_buckets_and_streams
from springtide.fabric.nats_jwt import KeyPair
from springtide.fabric.tasks import end

log = logging.getLogger(__name__)

Handler = Callable[[Msg], Awaitable[None]]

_FIRST_WAIT_S, _LAST_WAIT_S = 0.1, 1.0
_PING_INTERVAL_S = 0.5
_PINGS = 2  # without an answer, and the server is gone
_HANG_UP_S = 0.2
_GOODBYE_S = 2.0  # for what is still to be sent
_OUT_BUFFER = 32 * 2**20  # bytes that wait in this process for the socket, or for a reconnect
_IN_MESSAGES, _IN_BYTES = 1_000_000, 512 * 2**20  # what one subscription may hold until its handler runs


class _NatsLog(logging.Handler):
    """nats-py logs at error level what our callbacks are told anyway; here it is just counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


class _NotTlsEof(logging.Filter):
    """asyncio warns at each end of a TLS connection that nats-py upgraded itself; it means nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "returning true from eof_received" not in record.getMessage()


logging.getLogger("asyncio").addFilter(_NotTlsEof())
_nats_log = _NatsLog()
_nats_logger = logging.getLogger("nats")
_nats_logger.addHandler(_nats_log)
_nats_logger.propagate = False


class _Transport(TcpTransport):
    """nats-py hangs up politely: a server that is gone without a word would have to take what was written to it, or to
    answer TLS's farewell, and the new connection waits for that. This one is polite for a moment only."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __bool__(self) -> bool:
        return True  # nats-py would else put its own in our place before it connects

    async def wait_closed(self) -> None:
        writer = self._io_writer
        if writer is None:
            return
        closed = asyncio.ensure_future(writer.wait_closed())
        done, _ = await asyncio.wait({closed}, timeout=_HANG_UP_S)
        if not done:
            self.abort()
        await closed

    def abort(self) -> None:
        if self._io_writer is not None:
            self._io_writer.transport.abort()


class Subscription:
    """Interest in a subject that outlives the client it was made with."""

    def __init__(self, fabric: Fabric, subject: str, handler: Handler, queue: str) -> None:
        self.subject = subject
        self._fabric = fabric
        self._handler = handler
        self._queue = queue
        self._current: NatsSubscription | None = None

    async def _attach(self, client: Client) -> None:
        self._current = await client.subscribe(
            self.subject,
            queue=self._queue,
            cb=self._handler,
            pending_msgs_limit=_IN_MESSAGES,
            pending_bytes_limit=_IN_BYTES,
        )

    async def unsubscribe(self) -> None:
        """No further message reaches the handler. Harmless when repeated."""
        self._fabric._subscriptions.discard(self)
        current, self._current = self._current, None
        if current is not None:
            try:
                await current.unsubscribe()
            except nats.errors.Error:
                pass  # the client is gone, and the subscription with it


class Fabric:
    """See the module. Make one with `Fabric.connect`.

    `counters`: reconnects, reopened (a new client after nats-py gave up), permission_errors, slow_consumers,
    unsent (published while there was no connection and no room to keep it), errors.
    """

    def __init__(self, credentials: Credentials | Path, name: str) -> None:
        self._source = credentials
        self._credentials = credentials if isinstance(credentials, Credentials) else Credentials.load(credentials)
        self._name = name
        self._client = Client()
        self._subscriptions: set[Subscription] = set()
        self._on_reconnect: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._prepared = False
        self._reported: set[str] = set()
        self._last_error: BaseException | None = None
        self.counters: Counter[str] = Counter()

    @classmethod
    async def connect(cls, credentials: Credentials | Path, *, name: str, timeout: float = 10) -> Fabric:
        """Connect within `timeout` seconds. A path is read again at each reconnect, so that renewed credentials
        take effect. `name` is shown in the server's monitoring.

        Raises:
            SetupError: no server there, its certificate is not from our authority, or it refuses us.
        """
        fabric = cls(credentials, name)
        fabric._client = await fabric._open(timeout)
        return fabric

    @property
    def nc(self) -> Client:
        """nats-py's client of the moment; another one after a refusal, so do not keep it."""
        return self._client

    @property
    def js(self) -> JetStreamContext:
        return self._client.jetstream()

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def name(self) -> str:
        return self._name

    @property
    def urls(self) -> list[str]:
        return self._credentials.urls

    @property
    def connection_id(self) -> str:
        """Names this connection as the server's disconnect events do; "" while there is none."""
        server = self._client._server_info.get("server_id", "")
        return f"{server}/{self._client.client_id}" if self.connected else ""

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call back each time the connection is back: what was published in between may be lost."""
        self._on_reconnect.append(callback)

    def remove_on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        if callback in self._on_reconnect:
            self._on_reconnect.remove(callback)

    async def prepare(self) -> None:
        """Make sure that the buckets and streams exist, now and after each reconnect. Platform processes only.

        Raises:
            SetupError: the server keeps refusing.
        """
        await create_buckets_and_streams(self)
        if not self._prepared:
            self._prepared = True
            self.on_reconnect(lambda: create_buckets_and_streams(self))

    async def publish(self, subject: str, data: bytes, *, headers: dict[str, str] | None = None) -> bool:
        """Hand a message to the connection; false (counted) if there is none and no room to keep it.

        Raises:
            nats.errors.MaxPayloadError: more bytes than the server takes in one message.
        """
        try:
            await self._client.publish(subject, data, headers=headers)
        except nats.errors.MaxPayloadError:
            raise
        except nats.errors.Error:
            self.counters["unsent"] += 1
            return False
        return True

    async def request(
        self, subject: str, data: bytes = b"", *, timeout: float = 2.0, headers: dict[str, str] | None = None
    ) -> Msg:
        """One request, one answer.

        Raises:
            nats.errors.Error: no answer within `timeout` seconds, nobody listens, no connection.
        """
        return await self._client.request(subject, data, timeout=timeout, headers=headers)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Call `handler` for each message, one at a time, in order. With `queue`, one member of it gets each."""
        subscription = Subscription(self, subject, handler, queue)
        self._subscriptions.add(subscription)
        try:
            await subscription._attach(self._client)
        except nats.errors.ConnectionClosedError:
            pass  # attached with the next client
        return subscription

    async def flush(self, timeout: float = 2.0) -> bool:
        """Wait until the server has taken what was published; false if it did not answer.

        nats-py must never see this cancelled: its reader dies of the answer to a cancelled flush.
        """
        task = asyncio.ensure_future(self._client.flush(timeout=60))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait({task}, timeout=timeout)
        return bool(done) and task.exception() is None

    async def close(self) -> None:
        """Send what waits and disconnect, for good."""
        self._closing = True
        for task in list(self._tasks):
            await end(task)
        for subscription in list(self._subscriptions):
            await subscription.unsubscribe()
        await _close(self._client)

    # Connecting, for the first time and again.

    async def _open(self, timeout: float) -> Client:
        """A new connected client.

        Raises:
            SetupError: none within `timeout` seconds, or the server refused us.
        """
        if isinstance(self._source, Path):
            self._credentials = Credentials.load(self._source)
        self._last_error = None
        refused = asyncio.Event()
        deadline = asyncio.get_running_loop().time() + timeout
        while not refused.is_set() and (left := deadline - asyncio.get_running_loop().time()) > 0:
            client = await self._try_to_open(refused, left)
            if client is not None:
                return client
            await asyncio.sleep(_FIRST_WAIT_S)
        raise self._connect_error(self._credentials)

    async def _try_to_open(self, refused: asyncio.Event, timeout: float) -> Client | None:
        """A connected client, or None: it failed, was refused, or took too long. nats-py tries again by itself,
        but some failures (a server that hangs up while we speak) escape it."""
        client = Client()
        client._transport = _Transport()
        connecting = asyncio.create_task(self._connect_client(client, self._credentials, refused))
        refusal = asyncio.create_task(refused.wait())
        try:
            await asyncio.wait({connecting, refusal}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            refusal.cancel()
            connected = connecting.done() and connecting.exception() is None
            if not connected:
                await end(connecting)
                await _close(client)
        if connected:
            return client
        if not connecting.cancelled() and (error := connecting.exception()) is not None:
            self._last_error = self._last_error or error
        return None

    async def _connect_client(self, client: Client, credentials: Credentials, refused: asyncio.Event) -> None:
        async def on_error(error: Exception) -> None:
            self._note_error(error)
            if not client.is_connected and _is_final(error):
                refused.set()

        async def on_reconnected() -> None:
            self.counters["reconnects"] += 1
            self._spawn(self._tell_reconnected())

        async def on_closed() -> None:
            if client is self._client and not self._closing:
                self._spawn(self._reopen())

        left: dict[str, float] = {}  # when we turned to each server last

        def choose_server(pool: list[Server], info: dict[str, Any]) -> tuple[Server | None, float]:
            server = min(pool, key=lambda candidate: left.get(candidate.uri.netloc, 0.0))
            left[server.uri.netloc] = time.monotonic()
            # A whole fleet reconnects at once after a restart: spread it.
            wait = min(_LAST_WAIT_S, _FIRST_WAIT_S * 1.5 ** min(server.reconnects, 20))
            return server, wait * random.uniform(0.5, 1.0)

        await client.connect(
            servers=credentials.urls,
            name=self._name,
            user_jwt_cb=lambda: self._current_credentials().jwt.encode(),
            signature_cb=lambda nonce: _sign(self._current_credentials().seed, nonce),
            inbox_prefix=credentials.inbox_prefix,
            tls=_tls_context(credentials),
            tls_handshake_first=credentials.tls,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_FIRST_WAIT_S,  # type: ignore[arg-type]  # any number does
            reconnect_to_server_handler=choose_server,
            ping_interval=_PING_INTERVAL_S,  # type: ignore[arg-type]
            max_outstanding_pings=_PINGS,
            pending_size=_OUT_BUFFER,
            error_cb=on_error,
            reconnected_cb=on_reconnected,
            closed_cb=on_closed,
        )
        if client.connected_url is not None:
            left[client.connected_url.netloc] = time.monotonic()

    def _current_credentials(self) -> Credentials:
        """Those in the file, if it is readable; else the last ones that were."""
        if isinstance(self._source, Path):
            try:
                self._credentials = Credentials.load(self._source)
            except SetupError as error:
                self._report(f"keeping the old credentials: {error}")
        return self._credentials

    async def _reopen(self) -> None:
        """nats-py closed for good: go on with a new client."""
        wait = _FIRST_WAIT_S
        while not self._closing:
            try:
                client = await self._open(timeout=5.0)
                break
            except SetupError as error:
                self._report(f"{self._name}: {error}")
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(10 * _LAST_WAIT_S, wait * 1.5)
        else:
            return
        self._client = client
        self.counters["reopened"] += 1
        try:
            for subscription in list(self._subscriptions):
                await subscription._attach(client)
        except nats.errors.Error:
            return  # closed again: the next client takes over
        await self._tell_reconnected()

    async def _tell_reconnected(self) -> None:
        self._reported.clear()
        await asyncio.gather(*(self._call_reconnected(callback) for callback in self._on_reconnect))

    async def _call_reconnected(self, callback: Callable[[], Awaitable[None]]) -> None:
        try:
            await callback()
        except Exception:
            log.exception("%s: what should follow a reconnect failed", self._name)
            self.counters["errors"] += 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Errors.

    def _note_error(self, error: Exception) -> None:
        if self._last_error is None or not _is_final(self._last_error):  # what follows a refusal says less
            self._last_error = error
        text = str(error)
        if isinstance(error, nats.errors.SlowConsumerError):
            self.counters["slow_consumers"] += 1
        elif "permissions violation" in text:
            self.counters["permission_errors"] += 1
            self._report(f"{self._name}: {text}")
        else:
            self.counters["errors"] += 1
            if not isinstance(error, (OSError, nats.errors.Error, asyncio.TimeoutError)):
                log.error("%s: a message handler failed", self._name, exc_info=error)

    def _report(self, text: str) -> None:
        """Log a warning, but not the same one again and again."""
        if text not in self._reported:
            self._reported.add(text)
            log.warning(text)

    def _connect_error(self, credentials: Credentials) -> SetupError:
        where, error = ", ".join(credentials.urls), self._last_error
        if isinstance(error, ssl.SSLCertVerificationError):
            return SetupError(
                f"the fabric's server at {where} is not ours: {error.verify_message}",
                hint="its certificate must be signed by the authority that our credentials name",
            )
        if error is not None and "authorization violation" in str(error).lower():
            expires = credentials.expires
            hint = "they have ended: join anew" if _has_passed(expires) else "are they of another installation?"
            return SetupError(f"the fabric's server at {where} refuses our credentials", hint=hint)
        return SetupError(f"no answer from the fabric's server at {where}: {error}", hint="does it run?")


async def _close(client: Client) -> None:
    """Close, also where the server is gone and nats-py fails to say goodbye to it, or waits for it to listen."""
    closing = asyncio.ensure_future(client.close())
    done, _ = await asyncio.wait({closing}, timeout=_GOODBYE_S)
    if not done and isinstance(client._transport, _Transport):
        client._transport.abort()
    try:
        await closing
    except (OSError, RuntimeError, nats.errors.Error):  # uvloop says RuntimeError of a transport that is closed
        pass


def _is_final(error: BaseException) -> bool:
    """Whether trying again at once can't help."""
    return isinstance(error, ssl.SSLCertVerificationError) or "authorization violation" in str(error).lower()


def _has_passed(expires: float | None) -> bool:
    return expires is not None and expires < time.time()


def _tls_context(credentials: Credentials) -> ssl.SSLContext | None:
    if not credentials.tls:
        return None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the chain and the host name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=credentials.ca_pem)
        return context
    except ssl.SSLError as error:
        raise SetupError(f"the credentials of {credentials.name} hold no usable CA: {error}") from None


def _sign(seed: str, nonce: str) -> bytes:
    return base64.b64encode(KeyPair(seed).sign(nonce.encode()))
