"""The operator's API, on a listener of its own: what runs, what should, who may ask, what was used.

Every request carries `Authorization: Bearer TOKEN`, the token of `data_dir/admin.token`. Bodies and answers are
JSON, an unknown field is an error, and errors are OpenAI's error object.

    GET    /status                {"gateways": [{"id","url","region"}],
                                   "nodes": [{"id","region","site","devices","state","rtt_ms"}],
                                   "replicas": [{"id","model","node","engine","state","load"}],
                                   "deployments": [Deployment]}
    GET    /replicas              [Replica], each with all that it says of itself, the error of a failed one too

    GET    /deployments           [Deployment]
    PUT    /deployments           Deployment, made or changed
    DELETE /deployments/NAME      the Deployment that was

    GET    /nodes                 [Node and "drain": whether it was told to], those that are alive
    POST   /nodes/ID/drain        {"drain"?: true} -> {"node","drain"}; false: it may serve again
    POST   /node-tokens           {"ttl_s"?: 3600} -> {"token","url","expires","note"?}: lets one machine join, once;
                                  "note": only this machine can, since the fabric is not reachable from others

    GET    /tenants               [Tenant]
    PUT    /tenants/NAME          {"weight"?,"privacy"?} -> Tenant, made or changed
    GET    /keys[?limit=]         [{"id","name","hint","tenant","tenant_id","created","revoked"}], the newest first
    POST   /keys                  {"name"?,"tenant"?,"weight"?,"privacy"?} -> the same, and "key": the key itself,
                                  which is shown this once, and "published". A tenant that is new is made
    DELETE /keys/ID               revoked for good -> the same without "key". `published` false: the fabric is
                                  away, and the gateways will hear of it once it is back

    GET    /usage?by=...          {"rows","total","truncated"}; by: any of tenant, key, model, day with commas
    GET    /usage?by=request      {"rows": [Usage],"total","next"}, the newest first
           both: since=, until= (unix seconds, or ISO 8601), tenant= (name or id), key=, model=, limit=;
           the second: before= (the `next` of the page before)
    GET    /usage/REQUEST_ID      Usage

    GET    /requests/ID/explain   {"request_id","events": [{"at","gateway","what","why","attempt","node","replica"}],
                                   "left_out","silent_gateways","usage"}: what happened to a request of the last hour,
                                  asked of every gateway; no content of it

Times that come out are ISO 8601 in UTC, in a Usage unix seconds. Only loopback names are taken as Host: a web
page whose name was pointed at 127.0.0.1 gets nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from springtide.core.cluster import Deployment, KeyRecord, Replica
from springtide.core.errors import InvalidRequest, Overloaded, RequestError, SetupError, Unauthorized
from springtide.core.ids import new_id
from springtide.core.request import Usage
from springtide.fabric import subjects
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.desired import NodeIntent, Registry
from springtide.fabric.presence import PresenceView
from springtide.fabric.server import reach_beyond
from springtide.gateway.admin_types import (
    Call,
    DrainRequest,
    Explanation,
    GatewayStatus,
    KeyRequest,
    NewDeployment,
    NodeStatus,
    ReplicaStatus,
    Status,
    TenantRequest,
    TokenRequest,
    explanation,
)
from springtide.gateway.explain import Explainer
from springtide.gateway.http import ByteBudget, ClientGone, Cors, Exchange, Receive, Scope, Send
from springtide.ledger.keys import ApiKey, NotFound, check_name
from springtide.ledger.private_file import read_or_create
from springtide.ledger.store import Ledger
from springtide.ledger.usage import DIMENSIONS, UsageSummary

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY = 1024 * 1024
MAX_REPLICAS = 10_000
MAX_TOKEN_TTL_S = 7 * 24 * 3600.0
_BODY_TIMEOUT_S = 10.0
_FABRIC_PATIENCE_S = 3.0
_LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}


def ensure_admin_token(data_dir: Path) -> str:
    """The token in `data_dir/admin.token`, made at the first start. Raises SetupError."""
    return read_or_create(data_dir / "admin.token", lambda: secrets.token_hex(32))


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class Misdirected(InvalidRequest):
    """The request names another host than this listener's."""

    status = 421
    code = "misdirected_request"


Handler = Callable[[Call], Awaitable[Any]]


class AdminApi:
    """See the module. `ledger` or `authority` is None in a process that has none: its endpoints then say so.

    `fabric_urls` are those that a joining machine is given.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        presence: PresenceView,
        deployments: Registry[Deployment],
        intents: Registry[NodeIntent],
        authority: Authority | None,
        fabric: Fabric,
        fabric_urls: list[str],
        token: str,
        *,
        explainer: Explainer,
    ) -> None:
        self._maybe_ledger = ledger
        self._presence = presence
        self._deployments = deployments
        self._intents = intents
        self._authority = authority
        self._keys = Registry(fabric, subjects.KEYS, KeyRecord)
        self._fabric_urls = fabric_urls
        self._token = token.encode()
        self._explainer = explainer
        self._bodies = ByteBudget(16 * MAX_BODY)
        # By the parts of the path, then by method. "*" is what the path names; at the end, all the rest of it.
        self._routes: dict[tuple[str, ...], dict[str, Handler]] = {
            ("status",): {"GET": self._status},
            ("replicas",): {"GET": self._list_replicas},
            ("deployments",): {"GET": self._list_deployments, "PUT": self._put_deployment},
            ("deployments", "*"): {"DELETE": self._delete_deployment},
            ("nodes",): {"GET": self._list_nodes},
            ("nodes", "*", "drain"): {"POST": self._drain},
            ("node-tokens",): {"POST": self._make_node_token},
            ("tenants",): {"GET": self._list_tenants},
            ("tenants", "*"): {"PUT": self._put_tenant},
            ("keys",): {"GET": self._list_keys, "POST": self._create_key},
            ("keys", "*"): {"DELETE": self._revoke_key},
            ("usage",): {"GET": self._get_usage},
            ("usage", "*"): {"GET": self._get_one_usage},
            ("requests", "*", "explain"): {"GET": self._explain},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._serve(Exchange(new_id("adm"), scope, receive, send, Cors("")), scope)

    # One request.

    async def _serve(self, exchange: Exchange, scope: Scope) -> None:
        try:
            await exchange.respond(200, msgspec.json.encode(await self._answer(exchange, scope)))
        except ClientGone:
            pass
        except RequestError as error:
            await exchange.respond_error(error)
            if error.status == 413:
                await exchange.linger(4 * MAX_BODY)
        except Exception:
            log.exception("%s: %s %s failed", exchange.id, exchange.method, exchange.path)
            await exchange.respond_error(RequestError(f"this failed here; the log knows it as {exchange.id}"))
        finally:
            exchange.release(self._bodies)

    async def _answer(self, exchange: Exchange, scope: Scope) -> Any:
        _check_host(exchange.header(b"host"))
        self._check_token(exchange.header(b"authorization"))
        handler, named = self._route(exchange.method, exchange.path)
        query = dict(parse_qsl(scope.get("query_string", b"").decode("utf-8", "replace"), keep_blank_values=True))
        body = await exchange.read_body(self._bodies, limit=MAX_BODY, timeout=_BODY_TIMEOUT_S)
        return await handler(Call(named, query, body))

    def _check_token(self, authorization: str | None) -> None:
        scheme, _, token = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token):
            raise Unauthorized(
                "this needs the admin token",
                hint="send `Authorization: Bearer TOKEN`; it is in admin.token in the data dir",
            )

    def _route(self, method: str, path: str) -> tuple[Handler, str]:
        parts = path.strip("/").split("/")
        for pattern, methods in self._routes.items():
            named = _match(pattern, parts)
            if named is None:
                continue
            if method not in methods:
                raise MethodNotAllowed(f"{path[:200]} takes {' or '.join(methods)}, not {method}")
            return methods[method], named
        known = ", ".join(dict.fromkeys(f"/{pattern[0]}" for pattern in self._routes))
        raise NotFound(f"there is no {path[:200]}", hint=f"there are {known}")

    # What runs, and what should.

    async def _status(self, call: Call) -> Status:
        view = self._presence
        return Status(
            gateways=[GatewayStatus(g.id, g.url, g.region) for g in view.gateways()],
            nodes=[NodeStatus(n.id, n.region, n.site, n.devices, n.state, n.rtt_ms) for n in view.nodes()],
            replicas=[ReplicaStatus(r.id, r.model, r.node, r.engine, r.state, r.load) for r in view.replicas()],
            deployments=await self._list_deployments(call),
        )

    async def _list_replicas(self, call: Call) -> list[Replica]:
        return self._presence.replicas()

    async def _list_deployments(self, call: Call) -> list[Deployment]:
        return [deployment for _, deployment in sorted((await _soon(self._deployments.items())).items())]

    async def _put_deployment(self, call: Call) -> Deployment:
        deployment = call.read(NewDeployment)
        check_name("a deployment's name", deployment.name)
        if not deployment.source.strip():
            raise InvalidRequest("source is empty; it says which model", param="source")
        if not 0 <= deployment.replicas <= MAX_REPLICAS:
            message = f"replicas is {deployment.replicas}; it must lie in [0, {MAX_REPLICAS}]"
            raise InvalidRequest(message, param="replicas")
        await _soon(self._deployments.put(deployment.name, deployment))
        return deployment

    async def _delete_deployment(self, call: Call) -> Deployment:
        deployments = await _soon(self._deployments.items())
        if call.named not in deployments:
            raise NotFound(f"there is no deployment {call.named[:200]!r}", hint=_known(deployments))
        await _soon(self._deployments.delete(call.named))
        return deployments[call.named]

    async def _list_nodes(self, call: Call) -> list[dict[str, Any]]:
        intents = await _soon(self._intents.items())
        return [
            {**msgspec.to_builtins(node), "drain": node.id in intents and intents[node.id].drain}
            for node in self._presence.nodes()
        ]

    async def _drain(self, call: Call) -> NodeIntent:
        intent = NodeIntent(node=call.named, drain=call.read(DrainRequest).drain)
        if not intent.drain:
            await _soon(self._intents.delete(intent.node))
            return intent
        known = {node.id for node in self._presence.nodes()}
        if intent.node not in known:
            raise NotFound(f"there is no node {intent.node[:200]!r}", hint=_known(known))
        await _soon(self._intents.put(intent.node, intent))
        return intent

    async def _make_node_token(self, call: Call) -> dict[str, Any]:
        if self._authority is None:
            raise Overloaded("this process can't sign for nodes", hint="ask one that runs with a controller")
        ttl = call.read(TokenRequest).ttl_s
        if not 0 < ttl <= MAX_TOKEN_TTL_S:
            raise InvalidRequest(f"ttl_s is {ttl:g}; it must lie in (0, {MAX_TOKEN_TTL_S:g}]", param="ttl_s")
        token = self._authority.join_token(self._fabric_urls, ttl=ttl)
        expires = datetime.fromtimestamp(time.time() + ttl, UTC)
        answer = {"token": token, "url": self._fabric_urls[0], "expires": expires}
        if not reach_beyond(self._fabric_urls):
            answer["note"] = "the fabric listens on loopback, so only this machine can join with this token"
        return answer

    # Who may ask.

    @property
    def _ledger(self) -> Ledger:
        if self._maybe_ledger is None:
            raise Overloaded("this process has no ledger", hint="ask a gateway's admin API")
        return self._maybe_ledger

    async def _list_tenants(self, call: Call) -> Any:
        return await self._ledger.tenants()

    async def _put_tenant(self, call: Call) -> Any:
        change = call.read(TenantRequest)
        return await self._ledger.put_tenant(call.named, weight=change.weight, privacy=change.privacy)

    async def _list_keys(self, call: Call) -> list[dict[str, Any]]:
        return [_key_row(key) for key in await self._ledger.list_keys(call.limit(1000))]

    async def _create_key(self, call: Call) -> dict[str, Any]:
        new = call.read(KeyRequest)
        tenant = await self._ledger.put_tenant(new.tenant, weight=new.weight, privacy=new.privacy)
        record, key = await self._ledger.create_key(new.name or "unnamed", tenant.id)
        published = await self._publish(record)
        return {**_key_row(await self._ledger.key(record.id)), "key": key, "published": published}

    async def _revoke_key(self, call: Call) -> dict[str, Any]:
        record = await self._ledger.revoke_key(call.named)
        published = await self._publish(record)
        return {**_key_row(await self._ledger.key(record.id)), "published": published}

    async def _publish(self, record: KeyRecord) -> bool:
        """Tell the gateways at once. Should that fail, the ledger's worker will."""
        try:
            await _soon(self._keys.put(record.hash, record))
        except Overloaded as error:
            log.warning("key %s is not published yet: %s", record.id, error)
            return False
        return True

    # What was used.

    async def _get_usage(self, call: Call) -> dict[str, Any]:
        by = [name for name in call.query.get("by", "").split(",") if name]
        if by == ["request"]:
            answer = await self._list_requests(call)
        else:
            answer = await self._sum_up(call, by)
        (total,) = await self._ledger.usage_summary((), call.filter())
        return {**answer, "total": _usage_row(total, [])}

    async def _list_requests(self, call: Call) -> dict[str, Any]:
        limit = call.limit(100)
        rows = await self._ledger.list_usage(call.filter(), limit=limit, before=call.query.get("before"))
        return {"rows": rows, "next": rows[-1].request_id if len(rows) == limit else None}

    async def _sum_up(self, call: Call, by: list[str]) -> dict[str, Any]:
        limit = call.limit(1000)
        rows = await self._ledger.usage_summary(by, call.filter(), limit=limit) if by else []
        return {"rows": [_usage_row(row, by) for row in rows], "truncated": len(rows) == limit}

    async def _get_one_usage(self, call: Call) -> Usage:
        return await self._ledger.usage(call.named)

    # What happened.

    async def _explain(self, call: Call) -> Explanation:
        stories, silent = await self._explainer.ask_all(call.named)
        try:
            usage = await self._ledger.usage(call.named)
        except NotFound:
            usage = None
        if not stories and usage is None:
            raise NotFound(
                f"nothing is known of a request {call.named[:200]!r}", hint="what happened is kept for an hour"
            )
        return explanation(call.named, stories, silent, usage)


async def _soon(answer: Awaitable[T]) -> T:
    """What the fabric's store says. It is patient with a server that restarts; an operator should not have to be.

    Raises:
        Overloaded: it does not answer.
    """
    try:
        async with asyncio.timeout(_FABRIC_PATIENCE_S):
            return await answer
    except (TimeoutError, SetupError):
        raise Overloaded("the fabric does not answer", hint="does the NATS server run?", retry_after=2) from None


def _match(pattern: tuple[str, ...], parts: list[str]) -> str | None:
    """What "*" stands for (without one: ""), or None if the path is not of that pattern."""
    if pattern[-1] == "*" and len(parts) > len(pattern):  # names may hold slashes
        parts = [*parts[: len(pattern) - 1], "/".join(parts[len(pattern) - 1 :])]
    if len(parts) != len(pattern):
        return None
    named = ""
    for wanted, part in zip(pattern, parts, strict=True):
        if wanted == "*" and part:
            named = part
        elif wanted != part:
            return None
    return named


def _check_host(host: str | None) -> None:
    name = (host or "").strip().lower()
    if name.rpartition(":")[2].isdigit():
        name = name.rpartition(":")[0]
    if name not in _LOOPBACK:
        raise Misdirected(f"this is not {(host or '(no host)')[:200]}", hint="use http://127.0.0.1:PORT, or a tunnel")


def _known(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return f"there are {', '.join(listed[:20])}{more}" if listed else "there is none at all"


def _key_row(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "hint": key.hint,
        "tenant": key.tenant.name,
        "tenant_id": key.tenant.id,
        "created": key.created,
        "revoked": key.revoked,
    }


def _usage_row(summary: UsageSummary, by: list[str]) -> dict[str, Any]:
    """The dimensions that were asked for, then the sums."""
    values = msgspec.structs.asdict(summary)
    unasked = {name for dimension in DIMENSIONS if dimension not in by for name in (dimension, f"{dimension}_name")}
    return {name: value for name, value in values.items() if name not in unasked}


async def _live(receive: Receive, send: Send) -> None:
    """Nothing to start or stop: whoever serves us owns what we use."""
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
