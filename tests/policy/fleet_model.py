"""A small fleet in virtual time: gateways, replicas and the ways between them. The turns are those of the real keeper.

Pessimistic where it matters: what gateways say is 100 ms old when it is heard, turns and requests take their time too.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from springtide.core.request import PriorityClass
from springtide.policy.fairness import Flow, Turn, TurnKeeper

AD_EVERY_S = 0.05
AD_WAY_S = 0.1
LIVENESS_S = 0.25  # how often a replica looks for expired turns while nothing happens


@dataclass(eq=False)
class Asked:
    """A request. `tokens` is the length of its answer; prompts cost nothing here."""

    flow: Flow
    weight: float
    tokens: int
    created: float
    gateway: Gateway
    sequences: int = 1
    runs: bool = False  # at least one of its sequences has begun
    done: int = 0  # tokens of all its sequences
    ended: int = 0  # sequences
    on_end: Callable[[Asked], None] = lambda _: None


class Ad(NamedTuple):
    tenant: str
    priority_class: PriorityClass
    weight: float
    waiting: int
    served_elsewhere: float


@dataclass
class World:
    """The clock, and what happens when."""

    seed: int = 1
    way: float = 0.005  # seconds that a message takes, one way
    now: float = 0.0
    served: Counter[Flow] = field(default_factory=Counter)  # tokens
    waits: dict[Flow, list[float]] = field(default_factory=dict)  # seconds until a request ran

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, do))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, do = heapq.heappop(self._events)
            do()
        self.now = until

    def length(self, mean: float) -> int:
        """Many short answers, a few long ones."""
        return 1 + min(int(self.random.expovariate(1 / mean)), int(mean * 8))


@dataclass(eq=False)
class Seat:
    asked: Asked
    to_come: int  # tokens


class Fifo:
    """No turns: who comes is taken in, and waits inside. Stands in for a TurnKeeper."""

    by_turn = False

    def arrived(self, *_: object, **__: object) -> bool:
        return True

    def grants(self, *_: object) -> list[tuple[str, Turn]]:
        return []

    def nothing(self, *_: object) -> None: ...

    backlog = declined = served = left = nothing


class Replica:
    """Steps of `step` seconds; each gives every running sequence a token. `memory` is how many sequences fit, whatever
    the seats say."""

    def __init__(
        self, world: World, keeper: TurnKeeper | Fifo, capacity: int, step: float = 0.05, memory: int | None = None
    ) -> None:
        self.world, self.keeper, self.capacity, self.step = world, keeper, capacity, step
        self.seats = min(capacity, memory or capacity)
        self.gateways: dict[str, Gateway] = {}
        self.running: list[Seat] = []
        self.waiting: deque[Asked] = deque()
        self.most_held = 0
        self.steps = self.idle = 0  # steps, and seats that were empty in them
        self._report = (0, 0)
        self._stepping = False
        world.after(LIVENESS_S, self._look)

    @property
    def held(self) -> int:
        return len(self.running) + len(self.waiting)

    def on_open(self, asked: Asked, turn: int | None) -> None:
        if self.keeper.arrived(asked, asked.flow, asked.weight, asked.sequences, self.world.now, turn):
            self.waiting.extend([asked] * asked.sequences)
            self.most_held = max(self.most_held, self.held)
            self._go()
        else:
            self.world.after(self.world.way, lambda: asked.gateway.refused(asked))
        self.call()

    def on_ad(self, gateway: str, ads: list[Ad]) -> None:
        self.keeper.backlog(gateway, ads, self.world.now)
        self.call()

    def on_declined(self, gateway: str, serial: int) -> None:
        self.keeper.declined(gateway, serial, self.world.now)
        self.call()

    def call(self) -> None:
        for gateway, turn in self.keeper.grants(*self._report, self.world.now):
            self.world.after(self.world.way, lambda g=gateway, t=turn: self.gateways[g].on_turn(self, t))

    def _look(self) -> None:
        self.call()
        self.world.after(LIVENESS_S, self._look)

    def _go(self) -> None:
        if not self._stepping:
            self._stepping = True
            self._admit()
            self.world.after(self.step, self._step)

    def _admit(self) -> None:
        world = self.world
        while self.waiting and len(self.running) < self.seats:
            asked = self.waiting.popleft()
            self.running.append(Seat(asked, asked.tokens))
            if not asked.runs:
                asked.runs = True
                world.waits.setdefault(asked.flow, []).append(world.now - asked.created)
        self.steps += 1
        self.idle += self.seats - len(self.running)

    def _step(self) -> None:
        for seat in self.running:
            asked = seat.asked
            seat.to_come -= 1
            asked.done += 1
            self.world.served[asked.flow] += 1
            asked.gateway.seen[asked.flow, self] += 1
            self.keeper.served(asked, asked.done)
            asked.ended += not seat.to_come
            if not seat.to_come and asked.ended == asked.sequences:
                self.keeper.left(asked, asked.done)
                asked.on_end(asked)
        self.running = [seat for seat in self.running if seat.to_come]
        self._report = (len(self.running), len(self.waiting))
        self._stepping = False
        if self.held:
            self._go()
        self.call()


class Gateway:
    """Sends what finds room, lets the rest wait per flow, and tells all replicas what waits."""

    def __init__(self, world: World, name: str, replicas: list[Replica]) -> None:
        self.world, self.name, self.replicas = world, name, replicas
        self.queues: dict[Flow, deque[Asked]] = {}
        self.seen: Counter[tuple[Flow, Replica]] = Counter()  # tokens
        self.deaf = False  # it takes no turns and declines none
        for replica in replicas:
            replica.gateways[name] = self
        world.after(world.random.random() * AD_EVERY_S, self._tick)

    def ask(self, asked: Asked) -> None:
        roomy = self._roomy()
        if roomy and not self.queues.get(asked.flow):
            self._send(asked, roomy, None)
        else:
            self.queues.setdefault(asked.flow, deque()).append(asked)

    def _roomy(self) -> Replica | None:
        """The least loaded of those that take requests without a turn."""
        roomy = [r for r in self.replicas if not r.keeper.by_turn]
        return min(roomy, key=lambda r: r.held / r.capacity) if roomy else None

    def refused(self, asked: Asked) -> None:
        self.queues.setdefault(asked.flow, deque()).appendleft(asked)

    def on_turn(self, replica: Replica, turn: Turn) -> None:
        if self.deaf:
            return
        queue = self.queues.get((turn.tenant, turn.priority_class))
        if queue:
            self._send(queue.popleft(), replica, turn.serial)
        else:
            self.world.after(self.world.way, lambda: replica.on_declined(self.name, turn.serial))

    def _send(self, asked: Asked, replica: Replica, turn: int | None) -> None:
        self.world.after(self.world.way, lambda: replica.on_open(asked, turn))

    def _tick(self) -> None:
        for queue in self.queues.values():
            if queue and (roomy := self._roomy()):
                self._send(queue.popleft(), roomy, None)
        self._advertise()
        self.world.after(AD_EVERY_S, self._tick)

    def _advertise(self) -> None:
        total: Counter[Flow] = Counter()
        for (flow, _), tokens in self.seen.items():
            total[flow] += tokens
        for replica in self.replicas:
            ads = [
                Ad(*flow, queue[0].weight, sum(a.sequences for a in queue), total[flow] - self.seen[flow, replica])
                for flow, queue in self.queues.items()
                if queue
            ]
            self.world.after(AD_WAY_S, lambda r=replica, a=ads: r.on_ad(self.name, a))


class Fleet:
    """`gateways` and `replicas` of them, and ways to load them."""

    def __init__(
        self,
        *,
        gateways: int = 1,
        replicas: int = 1,
        capacity: int = 16,
        fair: bool = True,
        seed: int = 1,
        way: float = 0.005,
        step: float = 0.05,
        memory: int | None = None,
    ) -> None:
        self.world = World(seed, way)
        self.keepers = [TurnKeeper(capacity) if fair else Fifo() for _ in range(replicas)]
        self.replicas = [Replica(self.world, keeper, capacity, step, memory) for keeper in self.keepers]
        self.gateways = [Gateway(self.world, f"gw{i}", self.replicas) for i in range(gateways)]

    def clients(
        self,
        count: int,
        tenant: str,
        *,
        at: list[int] | None = None,
        weight: float = 1.0,
        mean: float = 40,
        priority_class: PriorityClass = "standard",
        sequences: int = 1,
    ) -> None:
        """So many clients, each of whom asks anew as soon as he is answered, at the gateways `at` in turn."""
        at = at or list(range(len(self.gateways)))
        for number in range(count):
            gateway = self.gateways[at[number % len(at)]]
            self.world.after(
                self.world.random.random() * 0.5,
                lambda g=gateway: self._ask(g, (tenant, priority_class), weight, mean, sequences, again=True),
            )

    def stream(
        self, per_second: float, tenant: str, *, gateway: int = 0, mean: float = 40, weight: float = 1.0
    ) -> None:
        """Requests that come at random, whatever becomes of those before."""

        def come() -> None:
            self._ask(self.gateways[gateway], (tenant, "standard"), weight, mean, 1, again=False)
            self.world.after(self.world.random.expovariate(per_second), come)

        self.world.after(self.world.random.expovariate(per_second), come)

    def _ask(self, gateway: Gateway, flow: Flow, weight: float, mean: float, sequences: int, *, again: bool) -> None:
        def next_one(_: Asked) -> None:
            if again:
                self._ask(gateway, flow, weight, mean, sequences, again=True)

        world = self.world
        gateway.ask(Asked(flow, weight, world.length(mean), world.now, gateway, sequences, on_end=next_one))

    def measure(self, seconds: float = 60.0, warm_up: float = 5.0) -> dict[str, int]:
        """Tokens per tenant, over so many seconds."""
        world = self.world
        world.run(world.now + warm_up)
        before = Counter(world.served)
        world.waits.clear()
        world.run(world.now + seconds)
        tokens: Counter[str] = Counter()
        for (tenant, _), count in (world.served - before).items():
            tokens[tenant] += count
        return dict(tokens)
