"""The gateway as a raw ASGI application: which path does what, who may, and the end of every error.

`GatewayApp.start` and `drain` frame its life; in between it is called once per HTTP request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable

import msgspec
from prometheus_client.core import Metric

from springtide.core.cluster import Deployment, KeyRecord
from springtide.core.config import Settings
from springtide.core.errors import GatewayStopping, KeyReused, RequestError, TakenOver
from springtide.core.ids import new_id
from springtide.fabric.desired import Registry
from springtide.fabric.presence import PresenceView
from springtide.fabric.streams import StreamHub
from springtide.gateway import metrics
from springtide.gateway.dispatch import Dispatch, Dispatcher, Patience
from springtide.gateway.http import (
    ByteBudget,
    ClientGone,
    Cors,
    Exchange,
    MethodNotAllowed,
    Receive,
    Scope,
    Send,
    read_priority_header,
    read_timeout_header,
)
from springtide.gateway.idempotency import IdempotencyKey, Position, read_key, read_last_event
from springtide.gateway.keys import KeyView
from springtide.gateway.limits import DEFAULT_LIMITS, Limits
from springtide.gateway.models import Models, model_object
from springtide.gateway.openai import Admission, Call, parse_chat, parse_completion
from springtide.gateway.relay import Relay, RelayContext, UsageSink
from springtide.gateway.trace import TraceBook
from springtide.gateway.waiting import WaitingRoom
from springtide.policy.retries import RetryBudget

log = logging.getLogger(__name__)

_TICK_S = 0.1
_SAVED_RETRIES_S = 10.0  # of the floor: a replica may die with many requests at once
_LAST_WORDS_S = 3.0  # for answers cut short to say so and be accounted for

Handler = Callable[[Exchange], Awaitable[None]]
Parse = Callable[[bytes, Admission], Call]

_COMPLETIONS: dict[str, tuple[Parse, str]] = {
    "/v1/chat/completions": (parse_chat, "chatcmpl"),
    "/v1/completions": (parse_completion, "cmpl"),
}


class _NotFound(RequestError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class GatewayApp:
    """One gateway's edge. `silence_counts`: see `Dispatcher`."""

    def __init__(
        self,
        settings: Settings,
        gateway_id: str,
        hub: StreamHub,
        presence: PresenceView,
        keys: KeyView,
        usage: UsageSink,
        *,
        deployments: Registry[Deployment],
        traces: TraceBook,
        limits: Limits = DEFAULT_LIMITS,
        silence_counts: Callable[[], bool] = lambda: True,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._keys = keys
        self._presence = presence
        self._hub = hub
        self._metrics = metrics.Metrics()
        self._metrics.watch(self._collect_metrics)
        self._room = WaitingRoom(presence, hub, region=settings.region)
        self._dispatcher = Dispatcher(
            hub,
            presence,
            self._room,
            RetryBudget(
                time.monotonic(),
                share=settings.retry_share,
                floor_per_s=settings.retry_floor,
                most=max(1.0, _SAVED_RETRIES_S * settings.retry_floor),
            ),
            patience=Patience(
                queue=settings.queue_timeout,
                first_token=settings.first_token_timeout,
                inter_token=settings.inter_token_timeout,
                hedge_after=settings.hedge_after,
            ),
            silence_counts=silence_counts,
        )
        self._models = Models(deployments, self._room.models)
        self._cors = Cors(settings.cors_origins)
        self._budget = ByteBudget(max(limits.held_bytes, settings.max_body_bytes))
        self._running: dict[asyncio.Task[None], Relay] = {}
        self._by_id: dict[str, Relay] = {}  # of requests that may come again, while they run
        self._traces = traces
        self._stopping = False
        self._ticking: asyncio.Task[None] | None = None
        self._relays = RelayContext(
            gateway=gateway_id,
            dispatcher=self._dispatcher,
            usage=usage,
            metrics=self._metrics,
            queue_timeout=settings.queue_timeout,
            silent_wait=settings.silent_wait,
            heartbeat_every=limits.heartbeat_every,
            send_timeout=limits.send_timeout,
        )
        self._pages: dict[str, Handler] = {
            "/v1/models": self._list_models,
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._show_metrics,
        }

    async def start(self) -> None:
        await self._models.start()
        self._ticking = asyncio.create_task(self._tick(), name="relay clock")

    async def drain(self, grace: float) -> None:
        """Take nothing new, let what runs end by itself for `grace` seconds, then end it, with usage written; what
        another gateway can go on with is left running for it."""
        self._stopping = True
        if self._running:
            await asyncio.wait(self._running, timeout=grace)
        for relay in list(self._running.values()):
            relay.interrupt(_stopping())
        if self._running:
            await asyncio.wait(self._running, timeout=_LAST_WORDS_S)
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        await self._models.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        _, prefix = _COMPLETIONS.get(scope["path"], (None, "req"))
        exchange = Exchange(new_id(prefix), scope, receive, send, self._cors)
        try:
            await self._route(exchange)
        except ClientGone:
            log.info("request id=%s path=%s outcome=left_early", exchange.id, _short(exchange.path))
        except RequestError as error:
            await self._reject(exchange, error)
        except Exception:
            log.exception("request %s failed", exchange.id)
            await self._reject(exchange, RequestError("the gateway failed on this request", code="internal_error"))

    # ------------------------------------------------------------------------------------------------------
    # Paths.

    async def _route(self, exchange: Exchange) -> None:
        path, method = exchange.path, exchange.method
        if method == "OPTIONS":
            await exchange.respond_preflight()
        elif path in _COMPLETIONS:
            _allow(exchange, "POST")
            await self._complete(exchange, *_COMPLETIONS[path])
        elif path in self._pages:
            _allow(exchange, "GET", "HEAD")
            await self._pages[path](exchange)
        elif path.startswith("/v1/models/"):
            _allow(exchange, "GET", "HEAD")
            await self._show_model(exchange, path.removeprefix("/v1/models/"))
        else:
            raise _NotFound(f"there is nothing at {_short(path)!r}", hint="the API's base URL ends in /v1")

    async def _reject(self, exchange: Exchange, error: RequestError) -> None:
        if exchange.started:
            return  # an answer is under way; its relay ends it
        self._metrics.rejected.labels(str(error.status)).inc()
        log.info(
            "request id=%s path=%s status=%d outcome=rejected code=%s",
            exchange.id,
            _short(exchange.path),
            error.status,
            error.code or error.type,
        )
        await exchange.respond_error(error)
        await exchange.linger(2 * self._settings.max_body_bytes)

    async def _list_models(self, exchange: Exchange) -> None:
        self._authenticate(exchange)
        models = [model_object(name, self._room.replicas(name)) for name in self._models.names()]
        await exchange.respond(200, msgspec.json.encode({"object": "list", "data": models}))

    async def _show_model(self, exchange: Exchange, name: str) -> None:
        self._authenticate(exchange)
        self._models.check(name)
        await exchange.respond(200, msgspec.json.encode(model_object(name, self._room.replicas(name))))

    async def _health(self, exchange: Exchange) -> None:
        await exchange.respond(200, b'{"status":"ok"}')

    async def _ready(self, exchange: Exchange) -> None:
        """503 until a replica is ready, and again when this gateway stops."""
        ready = sum(replica.state == "ready" for replica in self._presence.replicas())
        status = "stopping" if self._stopping else "ready" if ready and self._keys.ready else "waiting"
        body = msgspec.json.encode({"status": status, "ready_replicas": ready})
        await exchange.respond(200 if status == "ready" else 503, body)

    async def _show_metrics(self, exchange: Exchange) -> None:
        await exchange.respond(200, self._metrics.render(), content_type=metrics.CONTENT_TYPE)

    def _collect_metrics(self) -> Iterable[Metric]:
        yield metrics.gauge("requests_in_flight", "Requests admitted and not over", len(self._running))
        yield metrics.gauge("body_bytes_held", "Bytes of request bodies held", self._budget.held)
        yield metrics.gauges("requests_queued", "Requests that wait for a replica", self._room.waiting())
        dispatcher = self._dispatcher
        yield metrics.counter("attempts_lost", "Attempts whose replica was lost", dispatcher.attempts_lost)
        yield metrics.counter("attempts_resumed", "Attempts that went on with an answer", dispatcher.resumed)
        yield metrics.counter("attempts_hedged", "Attempts beside a silent one", dispatcher.hedged)
        yield metrics.gauge("traces", "Requests whose story is kept", len(self._traces))
        yield metrics.counters("stream_events", "What request streams went through", self._hub.counters)
        yield from metrics.replica_metrics(self._presence.replicas())

    def _authenticate(self, exchange: Exchange) -> KeyRecord:
        return self._keys.lookup(exchange.header(b"authorization"))

    # ------------------------------------------------------------------------------------------------------
    # Completions.

    async def _complete(self, exchange: Exchange, parse: Parse, prefix: str) -> None:
        self._check_open()
        key = self._authenticate(exchange)
        created = time.time()
        timeout = read_timeout_header(exchange.header(b"x-springtide-timeout")) or math.inf
        timeout = min(timeout, self._settings.total_timeout or math.inf)
        again = read_key(exchange.header(b"idempotency-key"), key.tenant.id)
        if again is not None:
            exchange.id = again.request_id(prefix)
        admission = Admission(
            id=exchange.id,
            tenant=key.tenant.id,
            weight=key.tenant.weight,
            priority_class=read_priority_header(exchange.header(b"x-springtide-priority")),
            created=created,
            deadline=created + timeout if timeout < math.inf else None,
            seed=again.seed if again is not None else None,
        )
        try:
            call = parse(await self._read_body(exchange), admission)
            self._models.check(call.request.model)
            after = read_last_event(exchange.header(b"last-event-id"), again, call)
            before = None
            if again is not None:
                call = _with_fingerprint(call, again)
                before = await self._take_from_ourselves(call)
            self._check_open()  # once more: what came before may have taken a while
            await self._relay(exchange, call, key, after, before)
        finally:
            exchange.release(self._budget)

    def _check_open(self) -> None:
        if self._stopping:
            raise _stopping()

    async def _take_from_ourselves(self, call: Call) -> Dispatch | None:
        """If this request runs here already, its connection is dead, or its client has had enough of it: end that one,
        so that this one can go on.

        Raises:
            KeyReused: what runs under this id is another request.
        """
        request, before = call.request, None
        while (relay := self._by_id.get(request.id)) is not None:
            if relay.fingerprint != request.fingerprint:
                raise KeyReused(
                    "this Idempotency-Key is in use for another request", hint="a key belongs to one body; take another"
                )
            relay.interrupt(TakenOver("the same request came again, and goes on there"))
            await relay.released.wait()
            before = relay.dispatch
            if self._by_id.get(request.id) is relay:
                del self._by_id[request.id]
        return before

    async def _read_body(self, exchange: Exchange) -> bytes:
        limits = self._limits
        return await exchange.read_body(self._budget, limit=self._settings.max_body_bytes, timeout=limits.body_timeout)

    async def _relay(
        self, exchange: Exchange, call: Call, key: KeyRecord, after: Position | None, before: Dispatch | None
    ) -> None:
        """Run the request in a task of its own, while this one watches whether the client is still there."""
        trace = self._traces.begin(call.request.id)
        trace.note("admitted", _in_short(call))
        relay = Relay(self._relays, exchange, call, key, trace, after=after, before=before)
        task = asyncio.create_task(relay.run())
        self._running[task] = relay
        task.add_done_callback(self._running.pop)
        if relay.fingerprint:
            self._by_id[call.request.id] = relay
            task.add_done_callback(lambda _: self._forget(call.request.id, relay))
        try:
            await exchange.until_gone()
        finally:
            relay.interrupt(None)
            if not task.done():
                await asyncio.wait({task})
        task.result()

    def _forget(self, request_id: str, relay: Relay) -> None:
        relay.released.set()
        if self._by_id.get(request_id) is relay:
            del self._by_id[request_id]

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for relay in list(self._running.values()):
                try:
                    relay.tick(now)
                except Exception:  # one request's trouble must not stop the clock of all
                    log.exception("a request's clock failed")


def _stopping() -> GatewayStopping:
    return GatewayStopping(
        "this gateway is stopping", hint="send it again: another gateway goes on with it", retry_after=1.0
    )


def _with_fingerprint(call: Call, key: IdempotencyKey) -> Call:
    request = msgspec.structs.replace(call.request, fingerprint=key.fingerprint(call))
    return msgspec.structs.replace(call, request=request)


def _in_short(call: Call) -> str:
    """What was asked, without its content."""
    request = call.request
    delivery = "streamed" if call.stream else "in one piece"
    return f"{request.model}, {call.dialect}, choices: {request.num_choices}, {request.priority_class}, {delivery}"


def _allow(exchange: Exchange, *methods: str) -> None:
    if exchange.method not in methods:
        raise MethodNotAllowed(methods, exchange.method)


def _short(path: str) -> str:
    """A path as it may stand in a log or an error: printable and bounded."""
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in path[:200])
