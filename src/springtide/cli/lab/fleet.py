"""A whole fleet on this machine, of the processes that production runs: fabric servers, gateways, a controller, agents
with their replicas. Each reaches the fabric through a cable of its own, and what dies is started again.

Knows how to start, hurt and end them; not why. Linux only where it looks for replicas' processes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import msgspec

from springtide.cli.lab.cable import Cable
from springtide.core.config import ENV_PREFIX
from springtide.core.errors import SetupError, SpringtideError
from springtide.fabric.authority import Authority
from springtide.fabric.server import Cluster, NatsServer
from springtide.fleet.children import Child, start_child

MODEL = "lab"  # what the deployment is called
_START_S = 120.0
_REVIVE_AFTER_S = 0.3
_GRACE_S = 6.0
_POLL_S = 0.05


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a fleet consists of. `options` are the engine's, `settings` those of every process."""

    gateways: int = 2
    agents: int = 3
    replicas: int = 4
    fabric_servers: int = 1
    engine: str = "mock"
    source: str = "mock"
    options: dict[str, Any] = {}
    settings: dict[str, str] = {}


class Part:
    """One process of the fleet that is kept up. `data_dir` and `port` are its own; `cables` lead it to the fabric."""

    def __init__(self, name: str, data_dir: Path, cables: list[Cable], start: Callable[[], Child]) -> None:
        self.name = name
        self.data_dir = data_dir
        self.cables = cables
        self.port = 0  # of a gateway's API
        self.ends_expected = 0  # how often it will have ended because we wanted it
        self.child: Child | None = None
        self._start = start

    def start(self) -> None:
        self.child = self._start()

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal. Harmless if it has ended."""
        if self.alive and self.child is not None:
            if number in (signal.SIGKILL, signal.SIGTERM):
                self.ends_expected += 1
            os.kill(self.child.pid, number)


class Fleet:
    """See the module. An asynchronous context manager: inside it is up and ready, after it nothing is left.

    `surprises` says what ended though nobody wanted it to.
    """

    def __init__(self, directory: Path, plan: FleetPlan, seed: int = 0) -> None:
        self.plan = plan
        self.gateways: list[Part] = []
        self.agents: list[Part] = []
        self.servers: list[NatsServer] = []
        self.key = ""
        self.surprises: list[str] = []
        self._dir = directory
        self._chance = random.Random(seed)
        self._authority = Authority.open(directory / "fabric")
        self._controller: Part | None = None
        self._down: set[NatsServer] = set()  # on purpose
        # Fabric servers die with the thread that starts them, so that one lives as long as we do.
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="fabric servers")
        self._http = httpx.AsyncClient(timeout=10, trust_env=False)
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Fleet:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- start and end -------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await self._start_servers()
        await self._open_ledger()
        self._controller = await self._part("controller", ("controller",), self._dir)
        for number in range(1, self.plan.gateways + 1):
            self.gateways.append(await self._gateway(f"gateway-{number}"))
        for part in (*self.gateways, self._controller):
            part.start()
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="fleet watch")
        await self.until(self._gateways_up, "the gateways")
        await self.scale(self.plan.replicas)
        for number in range(1, self.plan.agents + 1):
            self.agents.append(await self._agent(f"node-{number}"))
            self.agents[-1].start()
        await self.until_ready()

    async def _start_servers(self) -> None:
        count = self.plan.fabric_servers
        ports = free_ports(count)
        routes = [f"127.0.0.1:{port}" for port in ports]
        for number, port in enumerate(ports, 1):
            cluster = Cluster(server=f"s{number}", port=port, routes=routes) if count > 1 else None
            server = NatsServer(self._dir / f"nats-{number}", self._authority, cluster=cluster)
            self.servers.append(server)
            await self._in_keeper(server.start)

    async def _open_ledger(self) -> None:
        from springtide.ledger.first_key import ensure_first_key
        from springtide.ledger.store import Ledger

        ledger = await Ledger.open(self._database)
        try:
            self.key = (await ensure_first_key(ledger, self._dir)).key
        finally:
            await ledger.close()

    @property
    def _database(self) -> str:
        return f"sqlite:///{self._dir / 'ledger.db'}"

    async def _gateway(self, name: str) -> Part:
        (port,) = free_ports(1)
        part = await self._part(name, ("gateway",), self._dir / name, port=str(port))
        part.port = port
        return part

    async def _agent(self, node: str) -> Part:
        return await self._part(node, ("agent", "--node", node), self._dir / node)

    async def _part(self, name: str, command: tuple[str, ...], data_dir: Path, **settings: str) -> Part:
        cables = [Cable(server.port, self._chance) for server in self.servers]
        for cable in cables:
            await cable.start()
        urls = [f"nats://127.0.0.1:{cable.port}" for cable in cables]
        credentials = self._dir / "fabric" / f"{name}.creds"
        is_node = command[0] == "agent"
        sign = self._authority.local_node if is_node else self._authority.platform_credentials
        sign(name, urls).save(credentials)
        data_dir.mkdir(exist_ok=True)
        arguments = [sys.executable, "-m", "springtide.cli.main", *command]
        arguments += ["--credentials", str(credentials), "--data-dir", str(data_dir)]
        environment = self._environment(settings)
        log = data_dir / "logs" / f"{name}.log"
        return Part(name, data_dir, cables, lambda: start_child(arguments, env=environment, log_path=log))

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """What the lab's own user has set does not concern the fleet."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        ours = {"database_url": self._database, "grace": "2", **self.plan.settings, **settings}
        return {**inherited, **{ENV_PREFIX + name.upper(): value for name, value in ours.items()}}

    async def stop(self) -> None:
        """End everything, also what is stopped or half started. Harmless when repeated."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for pid in self.processes():
            _kill(pid, signal.SIGCONT)
        parts = [*self.agents, *self.gateways, *([self._controller] if self._controller is not None else [])]
        for part in parts:
            part.signal(signal.SIGTERM)
        await asyncio.gather(*(asyncio.to_thread(_end, part) for part in parts))
        for server in self.servers:
            await self._in_keeper(server.kill)
        for cable in [cable for part in parts for cable in part.cables]:
            await cable.stop()
        for pid in self.processes():
            _kill(pid, signal.SIGKILL)
        await self._http.aclose()
        self._keeper.shutdown()

    # -- keeping it up -------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Start again what has ended."""
        while True:
            await asyncio.sleep(_POLL_S)
            for part in self._parts():
                if part.child is not None and not part.alive:
                    await self._revive(part)
            for server in self.servers:
                if server not in self._down and not server.alive():
                    self.surprises.append("a fabric server ended")
                    await self._in_keeper(server.start)

    def _parts(self) -> list[Part]:
        return [*self.gateways, *self.agents, *([self._controller] if self._controller is not None else [])]

    async def _revive(self, part: Part) -> None:
        assert part.child is not None
        if part.ends_expected:
            part.ends_expected -= 1
        else:
            self.surprises.append(f"{part.name} ended: {part.child.last_words()}")
        part.child.kill_group()
        await asyncio.sleep(_REVIVE_AFTER_S)
        part.start()

    async def _in_keeper(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._keeper, work)

    # -- what is there -------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """All living processes of the fleet, found by the directory in their command lines."""
        return [pid for pid, _ in processes_that_name(str(self._dir))]

    def replica_pids(self, node: str | None = None) -> list[int]:
        """Of the replicas of one node, or of all."""
        found = processes_that_name(str(self._dir))
        return sorted(
            pid
            for pid, line in found
            if "springtide.fleet.replica_main" in line and (node is None or f" --node {node} " in line)
        )

    async def until(self, condition: Callable[[], Any], what: str, patience: float = _START_S) -> None:
        """Wait for a condition, which may be a coroutine function.

        Raises:
            SpringtideError: it did not come true in time.
        """
        deadline = time.monotonic() + patience
        while True:
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            if time.monotonic() > deadline:
                raise SpringtideError(f"{what}: not within {patience:.0f} s", hint=f"logs below {self._dir}")
            await asyncio.sleep(_POLL_S)

    async def until_ready(self, replicas: int | None = None) -> None:
        """Wait until every gateway sees so many ready replicas; by default all of the plan's."""
        wanted = self.plan.replicas if replicas is None else replicas

        async def ready() -> bool:
            seen = [await self._ready_replicas(gateway) for gateway in self.gateways]
            return all(count >= wanted for count in seen)

        await self.until(ready, f"{wanted} ready replicas")

    async def _ready_replicas(self, gateway: Part) -> int:
        try:
            answer = await self._http.get(f"http://127.0.0.1:{gateway.port}/ready")
            return int(answer.json()["ready_replicas"])
        except httpx.TransportError:
            return 0

    async def is_up(self, gateway: Part) -> bool:
        """Whether a gateway takes requests."""
        try:
            answer = await self._http.get(f"http://127.0.0.1:{gateway.port}/ready")
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    async def _gateways_up(self) -> bool:
        answers = [await self._answers(part) for part in self.gateways]
        return all(answers) and all((part.data_dir / "admin.url").exists() for part in self.gateways)

    async def _answers(self, gateway: Part) -> bool:
        try:
            return (await self._http.get(f"http://127.0.0.1:{gateway.port}/health")).status_code == 200
        except httpx.TransportError:
            return False

    # -- what an operator does -----------------------------------------------------------------------------

    async def admin(self, method: str, path: str, body: Any = None, patience: float = 30.0) -> Any:
        """Ask the admin API, of whichever gateway answers.

        Raises:
            SpringtideError: it refuses, or none answers in time.
        """
        deadline = time.monotonic() + patience
        for attempt in range(sys.maxsize):
            gateway = self.gateways[attempt % len(self.gateways)]
            try:
                url = (gateway.data_dir / "admin.url").read_text().strip()
                token = (gateway.data_dir / "admin.token").read_text().strip()
                headers = {"authorization": f"Bearer {token}"}
                answer = await self._http.request(method, url + path, json=body, headers=headers)
                if answer.status_code < 500:
                    break
            except (OSError, httpx.TransportError):
                pass
            if time.monotonic() > deadline:
                raise SpringtideError(f"no gateway answers {method} {path}", hint=f"logs below {self._dir}")
            await asyncio.sleep(0.1)
        if answer.is_error:
            raise SpringtideError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer.json() if answer.content else None

    async def scale(self, replicas: int) -> None:
        """Say how many replicas there should be."""
        plan = self.plan
        deployment = {"name": MODEL, "source": plan.source, "engine": plan.engine, "options": plan.options}
        await self.admin("PUT", "/deployments", {**deployment, "replicas": replicas})

    async def drain(self, node: str, drain: bool) -> None:
        await self.admin("POST", f"/nodes/{node}/drain", {"drain": drain})

    async def restart_server(self, server: NatsServer, down_s: float) -> None:
        """Kill a fabric server and start it again after `down_s` seconds."""
        self._down.add(server)
        try:
            await self._in_keeper(server.kill)
            await asyncio.sleep(down_s)
            await self._in_keeper(server.start)
        finally:
            self._down.discard(server)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def check_linux() -> None:
    """Raises SetupError where processes can't be found as we do it."""
    if sys.platform != "linux":
        raise SetupError("this looks for processes in /proc, which only Linux has", hint="run it on Linux")


def _end(part: Part) -> None:
    if part.child is not None:
        part.child.wait(_GRACE_S)
        part.child.kill_group()
        part.child.wait(_GRACE_S)
        part.child.abandon()


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def processes_that_name(text: str) -> list[tuple[int, str]]:
    """Living processes with `text` in their command line: pid and command line. Our own is none of them."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if text in line and state != "Z":
            found.append((int(entry.name), line))
    return found
