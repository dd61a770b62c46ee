"""Those who wait at one gateway, by model and flow, and what was served to each flow. Knows order and bounds; nothing
of replicas' loads, clocks or sockets."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from springtide.core.cluster import Replica
from springtide.core.request import Request
from springtide.fabric.streams import Flow
from springtide.policy.routing import RequestFacts

_BYTES_EACH = 2048  # of a waiting request, apart from its text
_MAX_FLOWS_REMEMBERED = 4096


class ReplicaKey(NamedTuple):
    node: str
    replica: str


class Place(NamedTuple):
    """Where a request may go now, and why, in words. `turn` is the serial of the turn that called it there."""

    replica: Replica
    reason: str
    turn: int | None = None
    waited: bool = False


@dataclass(slots=True, eq=False)
class Waiter:
    """One request that waits. `number` counts arrivals; `begun`: it ran before, and must go on."""

    request: Request
    facts: RequestFacts
    number: int
    begun: bool
    since: float
    placed: asyncio.Future[Place]
    size: int = 0

    def __post_init__(self) -> None:
        self.size = size(self.request)

    @property
    def flow(self) -> Flow:
        return Flow(self.request.tenant, self.request.priority_class)


class Line:
    """Those of one flow: first who was begun already, then in the order of their arrival."""

    def __init__(self) -> None:
        self.weight = 1.0
        self.sequences = 0
        self.bytes = 0
        self._begun: OrderedDict[int, Waiter] = OrderedDict()
        self._fresh: OrderedDict[int, Waiter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._begun) + len(self._fresh)

    def __iter__(self) -> Iterator[Waiter]:
        return chain(self._begun.values(), self._fresh.values())

    @property
    def head(self) -> Waiter:
        return next(iter(self))

    @property
    def last_fresh(self) -> Waiter | None:
        return self._fresh[next(reversed(self._fresh))] if self._fresh else None

    def add(self, waiter: Waiter) -> None:
        (self._begun if waiter.begun else self._fresh)[waiter.number] = waiter
        self.weight = waiter.request.weight
        self.sequences += waiter.facts.sequences
        self.bytes += waiter.size

    def remove(self, waiter: Waiter) -> bool:
        """Whether it was here."""
        if (self._begun if waiter.begun else self._fresh).pop(waiter.number, None) is None:
            return False
        self.sequences -= waiter.facts.sequences
        self.bytes -= waiter.size
        return True


class Lines:
    """All who wait at a gateway: at most `max_requests` of `max_bytes`. Beyond that, the last who came of the flow that
    holds the most has to go, so that nobody fills the room with his own; but nobody who was begun."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._models: dict[str, dict[Flow, Line]] = {}
        self._count = 0
        self._bytes = 0

    def models(self) -> list[str]:
        """Those for which somebody waits."""
        return list(self._models)

    def of(self, model: str) -> dict[Flow, Line]:
        """None of them is empty."""
        return self._models.get(model, {})

    def count(self, model: str) -> int:
        return sum(map(len, self.of(model).values()))

    def join(self, waiter: Waiter) -> list[Waiter]:
        """Who has to go for it, perhaps itself."""
        self._models.setdefault(waiter.request.model, {}).setdefault(waiter.flow, Line()).add(waiter)
        self._count += 1
        self._bytes += waiter.size
        expelled = []
        while self._count > self._max_requests or self._bytes > self._max_bytes:
            last = self._last_of_the_largest()
            if last is None:
                break
            self.remove(last)
            expelled.append(last)
        return expelled

    def remove(self, waiter: Waiter) -> bool:
        """Whether it was waiting."""
        flows = self._models.get(waiter.request.model, {})
        line = flows.get(waiter.flow)
        if line is None or not line.remove(waiter):
            return False
        self._count -= 1
        self._bytes -= waiter.size
        if not len(line):
            del flows[waiter.flow]
            if not flows:
                del self._models[waiter.request.model]
        return True

    def first(self, model: str, flow: Flow, suits: Callable[[Waiter], bool]) -> Waiter | None:
        """The first of a flow that suits. Of those that are fresh any one suits like any other."""
        line = self.of(model).get(flow)
        for waiter in line or ():
            if suits(waiter):
                return waiter
            if not waiter.begun:
                break
        return None

    def oldest(self, model: str) -> Waiter | None:
        """Who comes first where there are no turns: whoever was begun, then whoever waits longest."""
        heads = [line.head for line in self.of(model).values()]
        return min(heads, key=lambda waiter: (not waiter.begun, waiter.number), default=None)

    def _last_of_the_largest(self) -> Waiter | None:
        """Largest in what there is too much of."""
        by_bytes = self._bytes > self._max_bytes
        lines = [line for flows in self._models.values() for line in flows.values() if line.last_fresh is not None]
        largest = max(lines, key=lambda line: line.bytes if by_bytes else len(line), default=None)
        return largest.last_fresh if largest is not None else None


class Served:
    """How many tokens each flow got from each replica of one model, as far as this gateway saw."""

    def __init__(self) -> None:
        self._total: OrderedDict[Flow, float] = OrderedDict()  # the longest unchanged first
        self._by_replica: defaultdict[ReplicaKey, dict[Flow, float]] = defaultdict(dict)

    def add(self, flow: Flow, replica: ReplicaKey, tokens: float) -> None:
        self._total[flow] = self._total.get(flow, 0.0) + tokens
        self._total.move_to_end(flow)
        own = self._by_replica[replica]
        own[flow] = own.get(flow, 0.0) + tokens
        if len(self._total) > _MAX_FLOWS_REMEMBERED:
            forgotten, _ = self._total.popitem(last=False)
            for own in self._by_replica.values():
                own.pop(forgotten, None)

    def elsewhere(self, flow: Flow, replica: ReplicaKey) -> float:
        """What others than this replica served."""
        own = self._by_replica[replica].get(flow, 0.0) if replica in self._by_replica else 0.0
        return self._total.get(flow, 0.0) - own

    def forget_all_but(self, alive: Container[ReplicaKey]) -> None:
        """The other replicas are no more. What they served stays served."""
        for replica in [replica for replica in self._by_replica if replica not in alive]:
            del self._by_replica[replica]


def size(request: Request) -> int:
    """Roughly how many bytes a request holds while it waits."""
    messages = sum(len(message.content or "") for message in request.messages or ())
    prompts = sum(len(prompt) * (1 if isinstance(prompt, str) else 8) for prompt in request.prompts or ())
    said = sum(len(output.text) + 8 * len(output.token_ids) for output in request.outputs)
    return _BYTES_EACH + messages + prompts + said
