"""Who has had how much, and so who is next: virtual tokens of classes and tenants. Knows accounts and how many wait;
nothing of seats, turns, clocks or sockets (`springtide.policy.fairness` does, and drives this).

Two levels, alike: classes compete by `CLASS_WEIGHTS`, within a class its tenants by their own weights. An account
holds tokens per weight, and whoever has the least is next. A flow that begins to wait starts from the least of those
that wait already, or from where the last one stood that was let in: idleness earns nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

from springtide.core.request import PriorityClass

CLASS_WEIGHTS: dict[PriorityClass, float] = {"interactive": 16.0, "standard": 4.0, "batch": 1.0}
"""How the classes share the tokens when all of them wait. Strict preference would starve the last one."""

_FIRST_GUESS_TOKENS = 16.0
"""What a request costs, before the first has left. Rather too little: who comes second starts where the first stands
with all that it was charged in advance, and would be left behind alone if most of that were given back."""
_MEAN_OVER = 32  # requests that a running mean remembers
_MOST_DEBT = 4.0  # in fillings of the replica: what as many requests cost as it has seats
_LEAST_WEIGHT = 1e-3  # a weight of zero would mean never
_virtual = attrgetter("virtual")

Flow: TypeAlias = tuple[str, PriorityClass]
"""A tenant, and the class of these requests of his."""


class RunningMean:
    """A mean of the latest values, about `_MEAN_OVER` of them. The first one replaces the guess."""

    __slots__ = ("_count", "value")

    def __init__(self, guess: float) -> None:
        self.value = guess
        self._count = 0

    def add(self, value: float) -> None:
        self._count = min(self._count + 1, _MEAN_OVER)
        self.value += (value - self.value) / self._count


@dataclass(slots=True, eq=False)
class GatewayTurns:
    """What a gateway makes of its turns."""

    name: str
    named: set[Flow] = field(default_factory=set)  # the flows that it spoke of last
    turns: int = 0  # out now
    suspect: bool = False  # its last turn expired: it gets one at a time, until it takes or declines one


@dataclass(slots=True, eq=False)
class Line:
    """Those of one flow that wait at one gateway."""

    gateway: GatewayTurns
    waiting: int = 0  # sequences, as last told, less those that have come since
    called: int = 0  # sequences of them that have a turn
    told: int = 0  # how often the gateway has spoken of it
    served_elsewhere: float | None = None  # tokens, as last told
    credit: float = 0.0  # of the rotation between gateways

    @property
    def uncalled(self) -> int:
        """Sequences that may get a turn."""
        if self.gateway.suspect and self.gateway.turns:
            return 0
        return max(0, self.waiting - self.called)


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """What somebody has had. `virtual` is in tokens per weight, from a start that all who compete have in common."""

    weight: float
    virtual: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class ClassAccount(Account):
    """A class: its account among the classes, and the flows that compete within it."""

    queue: dict[Flow, FlowAccount] = field(default_factory=dict)  # those with somebody who waits and has no turn
    clock: float = 0.0  # where the last of its flows stood that was let in


@dataclass(slots=True, kw_only=True, eq=False)
class FlowAccount(Account):
    """A flow: its account within its class, where it waits, and what its requests are like."""

    key: Flow
    group: ClassAccount
    tokens: RunningMean  # of a request
    sequences: RunningMean
    lines: dict[str, Line] = field(default_factory=dict)  # by gateway
    turns: int = 0  # out now
    guests: int = 0  # requests that are here now

    @property
    def idle(self) -> bool:
        return not (self.turns or self.guests or any(line.waiting for line in self.lines.values()))

    def charge(self, tokens: float) -> None:
        """It has had so many tokens more; a negative number gives back what was charged too much."""
        self.virtual += tokens / self.weight
        self.group.virtual += tokens / self.group.weight

    def charge_request(self) -> float:
        """Charge in advance what a request of it is expected to use: so many tokens."""
        tokens = max(1.0, self.tokens.value)
        self.charge(tokens)
        return tokens

    def next_line(self) -> Line:
        """Whose turn it is among its gateways, each as often as it has waiting (smooth weighted round robin)."""
        lines = [(line, line.uncalled) for line in self.lines.values()]
        for line, uncalled in lines:
            line.credit += uncalled
        chosen = max((line for line, uncalled in lines if uncalled), key=attrgetter("credit"))
        chosen.credit -= sum(uncalled for _, uncalled in lines)
        return chosen


class Shares:
    """The accounts of all flows that one replica of `capacity` seats has lately heard of.

    Flows of which nothing waits and nothing is here are forgotten, the longest idle first, when they are more than
    `max_idle`.
    """

    def __init__(self, capacity: int, max_idle: int) -> None:
        self.tokens = RunningMean(_FIRST_GUESS_TOKENS)  # of a request of anybody
        self.flows: dict[Flow, FlowAccount] = {}
        self._capacity = capacity
        self._max_idle = max_idle
        self._idle: OrderedDict[Flow, None] = OrderedDict()  # the longest idle first
        self._classes = {name: ClassAccount(weight=weight) for name, weight in CLASS_WEIGHTS.items()}
        self._clock = 0.0  # where the last class stood of which somebody was let in

    def flow(self, key: Flow, weight: float) -> FlowAccount:
        """The account of a flow. Whoever asks must `place` it when he has done with it what he wants."""
        flow = self.flows.get(key)
        if flow is None:
            flow = self.flows[key] = FlowAccount(
                weight=weight,
                key=key,
                group=self._classes[key[1]],
                tokens=RunningMean(self.tokens.value),
                sequences=RunningMean(1.0),
            )
        flow.weight = max(_LEAST_WEIGHT, weight)
        return flow

    def anybody_waits(self) -> bool:
        """Whether there is a `next`."""
        return any(group.queue for group in self._classes.values())

    def next(self) -> FlowAccount:
        """Who has had the least, of those with somebody who waits and has no turn."""
        group: ClassAccount = min((group for group in self._classes.values() if group.queue), key=_virtual)
        flow: FlowAccount = min(group.queue.values(), key=_virtual)
        return flow

    def let_in(self, flow: FlowAccount) -> float:
        """The next one, or one that need not wait, is let in: the tokens charged for it in advance."""
        if flow.key not in flow.group.queue:
            self._lift(flow)
        self._clock, flow.group.clock = flow.group.virtual, flow.virtual
        return flow.charge_request()

    def place(self, flow: FlowAccount) -> None:
        """Put a flow where it belongs, after any change: in the queue if somebody waits for a turn, among the idle if
        there is nothing of it."""
        queue = flow.group.queue
        if any(line.uncalled for line in flow.lines.values()):
            if flow.key not in queue:
                if not flow.turns:  # else it only had all of its turns for a moment
                    self._lift(flow)
                queue[flow.key] = flow
        else:
            queue.pop(flow.key, None)
        self._idle.pop(flow.key, None)
        if flow.idle:
            self._idle[flow.key] = None
            if len(self._idle) > self._max_idle:
                del self.flows[self._idle.popitem(last=False)[0]]

    def forgive(self) -> None:
        """Let nobody who waits be further behind than the most: what he had elsewhere starves nobody for long."""
        groups = [group for group in self._classes.values() if group.queue]
        self._forgive_among(groups)
        for group in groups:
            self._forgive_among(group.queue.values())

    def _forgive_among(self, competitors: Collection[Account]) -> None:
        least = min(map(_virtual, competitors), default=0.0)
        for account in competitors:
            account.virtual = min(account.virtual, least + self._most_debt(account))

    def _lift(self, flow: FlowAccount) -> None:
        """It begins to compete: not before the least of those who do, and not too far behind."""
        group = flow.group
        if not group.queue:
            self._lift_to(group, [other.virtual for other in self._classes.values() if other.queue], self._clock)
        self._lift_to(flow, [other.virtual for other in group.queue.values()], group.clock)

    def _lift_to(self, account: Account, competitors: list[float], clock: float) -> None:
        least = min(competitors, default=clock)
        account.virtual = min(max(account.virtual, least), least + self._most_debt(account))

    def _most_debt(self, account: Account) -> float:
        return _MOST_DEBT * self._capacity * self.tokens.value / account.weight
