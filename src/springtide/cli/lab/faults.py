"""What befalls a fleet: one fault after another, chosen at random from a seed. Each heals by itself after a while.

Knows how each kind is done and undone, and how much a fleet must be left with; not what it should survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from springtide.cli.lab.cable import FAIR, Cable, Weather
from springtide.cli.lab.fleet import Fleet, Part
from springtide.core.errors import SpringtideError

_SLOW = Weather(delay=0.08, jitter=0.06, loss=0.05, retransmission=0.4)


class Fault(NamedTuple):
    """One that was done: when (unix seconds), which kind, to whom, and after how many seconds it was undone."""

    at: float
    kind: str
    victim: str
    seconds: float


Doing = Callable[[], Awaitable[Fault | None]]  # None: nothing to do it to


class Faults:
    """Does faults to `fleet`. `done` lists them all. With `gateways` they befall gateways alone."""

    def __init__(self, fleet: Fleet, seed: int, *, gateways: bool = False) -> None:
        self.done: list[Fault] = []
        self._fleet = fleet
        self._chance = random.Random(seed)
        self._healing: set[asyncio.Task[None]] = set()
        self._paused: set[int] = set()
        self._bad_lines: set[str] = set()
        self._drained: str | None = None
        of_gateways: list[Doing] = [self._kill_gateway, self._kill_gateway, self._stop_gateway]
        of_all: list[Doing] = [
            self._kill_replica, self._kill_agent, self._pause_replica, self._pause_agent,
            self._cut, self._slow, self._half_open, self._unreachable, self._restart_fabric, self._drain,
        ]  # fmt: skip
        self._kinds = of_gateways if gateways else of_all

    @property
    def by_kind(self) -> Counter[str]:
        return Counter(fault.kind for fault in self.done)

    async def go_on(self, every: float, until: float) -> None:
        """A fault every so many seconds, until a time (monotonic); then wait until the last of them is undone."""
        try:
            while time.monotonic() + every < until:
                await asyncio.sleep(every)
                await self.one()
            while self._healing:
                await asyncio.gather(*self._healing)
        finally:
            for task in self._healing:  # nobody waits for the end: the fleet is about to go
                task.cancel()

    async def one(self) -> None:
        """One fault, of a kind for which there is a victim now."""
        for _ in range(20):
            fault = await self._chance.choice(self._kinds)()
            if fault is not None:
                self.done.append(fault)
                return

    # Processes.

    async def _kill_replica(self) -> Fault | None:
        pids = [pid for pid in self._fleet.replica_pids() if pid not in self._paused]
        if not pids:
            return None
        pid = self._chance.choice(pids)
        _signal(pid, signal.SIGKILL)
        return Fault(time.time(), "replica killed", str(pid), 0)

    async def _kill_agent(self) -> Fault | None:
        agent = self._chance.choice(self._fleet.agents)
        if not agent.alive:
            return None
        agent.signal(signal.SIGKILL)
        return Fault(time.time(), "agent killed", agent.name, 0)

    async def _pause_replica(self) -> Fault | None:
        pids = [pid for pid in self._fleet.replica_pids() if pid not in self._paused]
        if len(pids) < 2:
            return None
        return self._pause("replica stopped", self._chance.choice(pids), self._chance.uniform(2, 8))

    async def _pause_agent(self) -> Fault | None:
        agent = self._chance.choice(self._fleet.agents)
        if not agent.alive or agent.child is None or agent.child.pid in self._paused:
            return None
        return self._pause("agent stopped", agent.child.pid, self._chance.uniform(2, 8))

    def _pause(self, kind: str, pid: int, seconds: float) -> Fault:
        self._paused.add(pid)
        _signal(pid, signal.SIGSTOP)

        async def go_on() -> None:
            await asyncio.sleep(seconds)
            _signal(pid, signal.SIGCONT)
            self._paused.discard(pid)

        self._later(go_on())
        return Fault(time.time(), kind, str(pid), seconds)

    async def _kill_gateway(self) -> Fault | None:
        return await self._end_gateway("gateway killed", signal.SIGKILL)

    async def _stop_gateway(self) -> Fault | None:
        return await self._end_gateway("gateway asked to leave", signal.SIGTERM)

    async def _end_gateway(self, kind: str, number: signal.Signals) -> Fault | None:
        """One of those that are up, while another one is."""
        up = [gateway for gateway in self._fleet.gateways if await self._fleet.is_up(gateway)]
        if len(up) < 2:
            await asyncio.sleep(0.1)
            return None
        victim = self._chance.choice(up)
        victim.signal(number)
        return Fault(time.time(), kind, victim.name, 0)

    # Lines to the fabric, and the fabric.

    def _line(self) -> Part:
        return self._chance.choice([*self._fleet.agents, *self._fleet.gateways])

    async def _cut(self) -> Fault | None:
        part = self._line()
        for cable in part.cables:
            cable.cut()
        return Fault(time.time(), "line cut", part.name, 0)

    async def _slow(self) -> Fault | None:
        def begin(cable: Cable) -> None:
            cable.weather = _SLOW

        def end(cable: Cable) -> None:
            cable.weather = FAIR

        return self._worsen("line slow and lossy", self._line(), self._chance.uniform(2, 6), begin, end)

    async def _half_open(self) -> Fault | None:
        """What has a connection is not told that nothing passes on it any more. A new one would do."""

        def begin(cable: Cable) -> None:
            cable.freeze(new_ones_too=False)

        return self._worsen("line half-open", self._line(), self._chance.uniform(2, 8), begin, Cable.thaw)

    async def _unreachable(self) -> Fault | None:
        """A node that nobody reaches, and that reaches nobody. Of a gateway nothing could be asked meanwhile."""

        def begin(cable: Cable) -> None:
            cable.freeze(new_ones_too=True)

        node = self._chance.choice(self._fleet.agents)
        return self._worsen("node unreachable", node, self._chance.uniform(2, 8), begin, Cable.thaw)

    def _worsen(
        self, kind: str, part: Part, seconds: float, begin: Callable[[Cable], None], end: Callable[[Cable], None]
    ) -> Fault | None:
        if part.name in self._bad_lines:
            return None
        self._bad_lines.add(part.name)
        for cable in part.cables:
            begin(cable)

        async def go_on() -> None:
            await asyncio.sleep(seconds)
            for cable in part.cables:
                end(cable)
            self._bad_lines.discard(part.name)

        self._later(go_on())
        return Fault(time.time(), kind, part.name, seconds)

    async def _restart_fabric(self) -> Fault | None:
        servers = self._fleet.servers
        if not all(server.alive() for server in servers):
            return None
        server, seconds = self._chance.choice(servers), self._chance.uniform(0.1, 1.0)
        self._later(self._fleet.restart_server(server, seconds))
        return Fault(time.time(), "fabric server killed", server.directory.name, seconds)

    async def _drain(self) -> Fault | None:
        if self._drained is not None:
            return None
        node = self._drained = self._chance.choice(self._fleet.agents).name
        seconds = self._chance.uniform(3, 8)

        async def drain_and_undo() -> None:
            try:
                with contextlib.suppress(
                    SpringtideError
                ):  # an agent that was just killed is no node that can be drained
                    await self._fleet.drain(node, True)
                await asyncio.sleep(seconds)
                await self._fleet.drain(node, False)
            finally:
                self._drained = None

        self._later(drain_and_undo())
        return Fault(time.time(), "node drained", node, seconds)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
