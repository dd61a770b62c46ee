"""A gateway process: all its parts put together, started in order, stopped in the other order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from springtide.core.cluster import Deployment, Gateway, KeyRecord
from springtide.core.config import Settings
from springtide.core.errors import SetupError
from springtide.core.ids import new_id
from springtide.fabric import subjects
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.desired import NodeIntent, Registry
from springtide.fabric.files import write_private
from springtide.fabric.presence import MAX_AGE_S, Heart, PresenceView
from springtide.fabric.server import urls_for_nodes
from springtide.fabric.streams import StreamHub
from springtide.fabric.usage import UsageWriter
from springtide.gateway.admin import AdminApi, ensure_admin_token
from springtide.gateway.app import GatewayApp
from springtide.gateway.explain import Explainer
from springtide.gateway.keys import KeyView
from springtide.gateway.limits import DEFAULT_LIMITS, Limits
from springtide.gateway.listener import Certificate, Listener
from springtide.gateway.trace import TraceBook
from springtide.ledger.database import database_url
from springtide.ledger.store import Ledger
from springtide.ledger.worker import LedgerWorker

_CUT_S = 1.0  # for connections that linger after the last answer


async def run_gateway(
    credentials: Path,
    settings: Settings,
    data_dir: Path,
    *,
    stop: asyncio.Event,
    gateway_id: str | None = None,
    ready: Callable[[str], None] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Serve until `stop` is set, then let what runs end within `limits.grace` seconds.

    `ready` is called with the base URL once connections are accepted. `<data_dir>/admin.url` then says where
    the operator's API listens (loopback only), and is gone after the end.

    Raises:
        SetupError: a port, a certificate, the fabric, the ledger or the data dir is not right.
    """
    gateway_id = gateway_id or new_id("gateway")
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_rare_collections())
        fabric = await Fabric.connect(credentials, name=gateway_id)
        stack.push_async_callback(fabric.close)
        await fabric.prepare()
        parts = _Parts(stack, fabric, settings, data_dir, gateway_id, limits)
        admin_url = await parts.start_admin()
        url = await parts.start_edge()
        admin_file = data_dir / "admin.url"
        write_private(admin_file, admin_url.encode())
        stack.callback(admin_file.unlink, missing_ok=True)
        if ready is not None:
            ready(url)
        await stop.wait()


class _Parts:
    """What one gateway process runs. Each `start_` leaves on the stack how to stop it."""

    def __init__(
        self,
        stack: contextlib.AsyncExitStack,
        fabric: Fabric,
        settings: Settings,
        data_dir: Path,
        gateway_id: str,
        limits: Limits,
    ) -> None:
        self._stack = stack
        self._fabric = fabric
        self._settings = settings
        self._data_dir = data_dir
        self._id = gateway_id
        self._limits = limits
        self._started = time.time()
        self._presence = PresenceView(fabric)
        self._deployments = Registry(fabric, subjects.DEPLOYMENTS, Deployment)
        self._traces = TraceBook()

    async def start_admin(self) -> str:
        """Presence, the ledger, its worker, and the operator's API over all of them. Returns the API's URL."""
        await self._presence.start()
        self._stack.push_async_callback(self._presence.stop)
        ledger = await Ledger.open(database_url(self._settings))
        self._stack.push_async_callback(ledger.close)
        explainer = Explainer(self._fabric, self._id, self._presence, self._traces)
        await explainer.start()
        self._stack.push_async_callback(explainer.stop)
        worker = LedgerWorker(ledger, self._fabric, self._id)
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        admin = self._admin_api(ledger, explainer)
        listener = Listener(admin, "127.0.0.1", self._settings.admin_port, limits=self._limits)
        await listener.start()
        self._stack.push_async_callback(_stop_admin, listener)
        return listener.url

    def _admin_api(self, ledger: Ledger, explainer: Explainer) -> AdminApi:
        directory = self._data_dir / "fabric"
        return AdminApi(
            ledger,
            self._presence,
            self._deployments,
            Registry(self._fabric, subjects.INTENTS, NodeIntent),
            # Only the machine that has the authority's secrets can let others join.
            Authority.open(directory) if directory.is_dir() else None,
            self._fabric,
            urls_for_nodes(self._fabric.urls, self._settings.fabric_host),
            ensure_admin_token(self._data_dir),
            explainer=explainer,
        )

    async def start_edge(self) -> str:
        """The public listener and all that answers there. Returns its base URL."""
        app = await self._make_app()
        listener = Listener(
            app,
            self._settings.host,
            self._settings.port,
            limits=self._limits,
            certificate=_certificate(self._settings),
        )
        await listener.start()
        self._stack.push_async_callback(_stop_edge, listener, app, self._limits)
        heart = Heart(self._fabric, lambda: self._describe(listener.url))
        await heart.start()
        self._stack.push_async_callback(heart.stop)
        return listener.url

    async def _make_app(self) -> GatewayApp:
        hub = StreamHub(self._fabric, self._id, open_patience=self._settings.connect_timeout or math.inf)
        await hub.start()
        self._stack.push_async_callback(hub.close)
        keys = KeyView(Registry(self._fabric, subjects.KEYS, KeyRecord))
        await keys.start()
        self._stack.push_async_callback(keys.stop)
        usage = UsageWriter(self._fabric, self._data_dir / "usage-spool")
        await usage.start()
        self._stack.push_async_callback(usage.stop)
        app = GatewayApp(
            self._settings,
            self._id,
            hub,
            self._presence,
            keys,
            usage,
            deployments=self._deployments,
            traces=self._traces,
            limits=self._limits,
            silence_counts=_Line(self._fabric).steady,
        )
        await app.start()
        return app

    def _describe(self, url: str) -> Gateway:
        return Gateway(id=self._id, url=url, region=self._settings.region, started=self._started)


async def _stop_edge(listener: Listener, app: GatewayApp, limits: Limits) -> None:
    listener.close()
    await app.drain(limits.grace)
    await listener.wait_closed(_CUT_S)


async def _stop_admin(listener: Listener) -> None:
    listener.close()
    await listener.wait_closed(_CUT_S)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """What a request leaves behind goes by reference count. To look for cycles as often as Python does by default
    takes a quarter of a busy gateway's time."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what is here now stays: no need to look at it again
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _certificate(settings: Settings) -> Certificate | None:
    if not settings.tls_cert and not settings.tls_key:
        return None
    if not settings.tls_cert or not settings.tls_key:
        raise SetupError("TLS needs both tls_cert and tls_key", hint="name the PEM files of both, or of neither")
    return Certificate(Path(settings.tls_cert), Path(settings.tls_key))


class _Line:
    """Whether our own line to the fabric has stood long enough for another's silence to mean something."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._back_at = float("-inf")
        fabric.on_reconnect(self._on_reconnect)

    async def _on_reconnect(self) -> None:
        self._back_at = time.monotonic()

    def steady(self) -> bool:
        return self._fabric.connected and time.monotonic() - self._back_at > MAX_AGE_S
