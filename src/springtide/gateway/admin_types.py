"""What the operator's API takes and gives, as types. Knows nothing of who answers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from springtide.core.cluster import Deployment, Device, PrivacyClass
from springtide.core.engine_api import EngineLoad
from springtide.core.errors import InvalidRequest
from springtide.core.request import Usage
from springtide.gateway.explain import Story
from springtide.ledger.keys import DEFAULT_TENANT
from springtide.ledger.usage import UsageFilter

T = TypeVar("T")


class GatewayStatus(msgspec.Struct, frozen=True):
    id: str
    url: str
    region: str


class NodeStatus(msgspec.Struct, frozen=True):
    id: str
    region: str
    site: str
    devices: list[Device]
    state: str
    rtt_ms: float | None


class ReplicaStatus(msgspec.Struct, frozen=True):
    id: str
    model: str
    node: str
    engine: str
    state: str
    load: EngineLoad


class Status(msgspec.Struct, frozen=True):
    """What runs, and what should."""

    gateways: list[GatewayStatus]
    nodes: list[NodeStatus]
    replicas: list[ReplicaStatus]
    deployments: list[Deployment]


class NewDeployment(Deployment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Deployment as an operator writes it: a misspelt field is an error, not a default."""


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    drain: bool = True


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ttl_s: float = 3600.0


class TenantRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    weight: float | None = None
    privacy: PrivacyClass | None = None


class KeyRequest(TenantRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = ""
    tenant: str = DEFAULT_TENANT


class Call(msgspec.Struct, frozen=True):
    """A request that was let in: what its path names (an id, a name), its query, its body."""

    named: str
    query: dict[str, str]
    body: bytes

    def read(self, type: type[T]) -> T:
        """The body as `type`; an empty one is `{}`. Raises InvalidRequest."""
        try:
            return msgspec.json.decode(self.body or b"{}", type=type)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the body is not right: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from None

    def limit(self, default: int) -> int:
        """Raises InvalidRequest. The ledger knows the bounds."""
        text = self.query.get("limit", str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InvalidRequest(f"limit is {text[:40]!r}; it takes a number", param="limit")
        return int(text)

    def moment(self, name: str) -> datetime | None:
        """A time in the query, unix seconds or ISO 8601 (without a zone: UTC). Raises InvalidRequest."""
        text = self.query.get(name)
        if text is None:
            return None
        try:
            return datetime.fromtimestamp(float(text), UTC)
        except (ValueError, OverflowError, OSError):
            pass
        try:
            moment = datetime.fromisoformat(text)
            return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            message = f"{name} is {text[:40]!r}; it takes unix seconds, or ISO 8601 such as 2026-03-01T12:00:00Z"
            raise InvalidRequest(message, param=name) from None

    def filter(self) -> UsageFilter:
        """Raises InvalidRequest."""
        names = {name: self.query.get(name) for name in ("tenant", "key", "model")}
        return UsageFilter(since=self.moment("since"), until=self.moment("until"), **names)


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a request's story. `at` in unix seconds; `attempt` 0: of none."""

    at: float
    gateway: str
    what: str
    why: str
    attempt: int
    node: str
    replica: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a request, over all gateways, in order. `left_out` counts events that were not kept;
    `silent_gateways` did not say what they know; `usage` is None where the ledger has no record under this id."""

    request_id: str
    events: list[Happening]
    left_out: int
    silent_gateways: list[str]
    usage: Usage | None


def explanation(request_id: str, stories: list[Story], silent: list[str], usage: Usage | None) -> Explanation:
    events = [
        Happening(
            at=event.at,
            gateway=story.gateway,
            what=event.what,
            why=event.why,
            attempt=event.attempt,
            node=event.node,
            replica=event.replica,
        )
        for story in stories
        for event in story.events
    ]
    return Explanation(
        request_id=request_id,
        events=sorted(events, key=lambda event: event.at),
        left_out=sum(story.left_out for story in stories),
        silent_gateways=silent,
        usage=usage,
    )
