"""A node's agent: runs here what the controller wants here. Says what this machine is and that it lives.

Level-triggered: it is told all that should run, compares, and starts or stops what differs. It runs no engine
that is not on its own list, whoever asks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from springtide import __version__
from springtide.core.cluster import DesiredReplica, DesiredState, Device, Node
from springtide.core.config import ENV_PREFIX, Settings
from springtide.fabric.connection import Fabric
from springtide.fabric.credentials import Credentials
from springtide.fabric.desired import DesiredReader
from springtide.fabric.join import renew
from springtide.fabric.presence import Heart
from springtide.fleet.announcer import Announcer
from springtide.fleet.children import Child, start_child
from springtide.fleet.devices import find_devices
from springtide.fleet.replica_main import DRAIN_GRACE, describe, encode_spec
from springtide.fleet.supervisor import Supervisor

logger = logging.getLogger(__name__)

ALLOWED_ENGINES = frozenset({"springtide", "mock"})
REPLICA_COMMAND = (sys.executable, "-m", "springtide.fleet.replica_main")

_STOP_GRACE = 1.0  # for running requests when the agent itself leaves; gateways move what is left
_RTT_INTERVAL = 5.0
_RENEWAL_RETRY = 30.0
_REPLICA_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # it becomes a file name
_REPLICA_SETTINGS = ("data_dir", "model_dir", "region", "site", "log_level")


class Agent:
    """The agent of `node`, speaking through `fabric`.

    Args:
        credentials: the file that its replicas connect with; renewed in place before it expires.
        replica_command: what to start for a replica, without its arguments.
    """

    def __init__(
        self,
        fabric: Fabric,
        node: str,
        settings: Settings,
        *,
        credentials: Path,
        data_dir: Path,
        replica_command: Sequence[str] = REPLICA_COMMAND,
    ) -> None:
        self.node = node
        self._fabric = fabric
        self._settings = settings
        self._credentials = credentials
        self._data_dir = data_dir
        self._command = tuple(replica_command)
        self._heart = Heart(fabric, self._describe)
        self._reader = DesiredReader(fabric, node, self._on_state)
        self._devices: list[Device] = []
        self._rtt_ms: float | None = None
        self._desired: DesiredState | None = None
        self._changed = asyncio.Event()
        self._running: dict[str, tuple[DesiredReplica, Supervisor]] = {}
        self._stopping: dict[str, tuple[Supervisor, asyncio.Task[None]]] = {}
        self._refused: dict[str, Announcer] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> dict[str, int]:
        """The process of each replica that is up."""
        return {id: supervisor.pid for id, (_, supervisor) in self._running.items() if supervisor.pid is not None}

    async def start(self) -> None:
        """Announce the node and begin to follow its desired state."""
        self._devices = await asyncio.to_thread(find_devices)
        await self._heart.start()
        for work in (self._reconcile_forever(), self._measure_rtt(), self._renew_credentials()):
            self._tasks.append(asyncio.get_running_loop().create_task(work))
        await self._reader.start()

    async def stop(self) -> None:
        """End all replicas, with a moment for what they run. The node is not given up: it may be back soon."""
        await self._reader.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        supervisors = [supervisor for _, supervisor in self._running.values()]
        supervisors += [supervisor for supervisor, _ in self._stopping.values()]
        draining = [task for _, task in self._stopping.values()]  # to be hurried like the others
        for task in draining:
            task.cancel()
        await asyncio.gather(*draining, return_exceptions=True)
        await asyncio.gather(*(supervisor.stop(_STOP_GRACE) for supervisor in supervisors))
        for announcer in self._refused.values():
            await announcer.stop()
        await self._heart.stop()

    # -- desired state -------------------------------------------------------------------------------------

    def _on_state(self, state: DesiredState) -> None:
        self._desired = state
        self._changed.set()
        self._heart.beat_now()

    async def _reconcile_forever(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._reconcile(self._desired.replicas if self._desired else [])
            except Exception:  # one bad state must not end the agent; the next one may be better
                logger.exception("the desired state can't be followed")

    async def _reconcile(self, wanted: list[DesiredReplica]) -> None:
        allowed = {replica.id: replica for replica in wanted if self._is_allowed(replica)}
        for id, (desired, supervisor) in tuple(self._running.items()):
            if allowed.get(id) != desired:
                self._stop_later(id, supervisor)
        await self._refuse([replica for replica in wanted if replica.id not in allowed])
        for id, replica in allowed.items():
            if id not in self._running and id not in self._stopping:
                self._running[id] = replica, self._supervise(replica)

    def _is_allowed(self, replica: DesiredReplica) -> bool:
        return replica.engine in ALLOWED_ENGINES and _REPLICA_ID.fullmatch(replica.id) is not None

    def _supervise(self, desired: DesiredReplica) -> Supervisor:
        logger.info("starting replica %s of %s (engine %s)", desired.id, desired.deployment, desired.engine)
        arguments = [
            *self._command,
            *("--credentials", str(self._credentials)),
            *("--node", self.node),
            *("--spec", encode_spec(desired)),
            *("--data-dir", str(self._data_dir)),
        ]
        log_path = self._data_dir / "logs" / f"{desired.id}.log"

        def start_process() -> Child:
            return start_child(arguments, log_path=log_path, env=self._child_environment())

        return Supervisor(self._fabric, describe(desired, self.node, self._settings), start_process)

    def _child_environment(self) -> dict[str, str]:
        """Of our settings a replica sees those that concern it, and no database password."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        ours = {ENV_PREFIX + name.upper(): str(getattr(self._settings, name)) for name in _REPLICA_SETTINGS}
        return {**inherited, **ours}

    def _stop_later(self, id: str, supervisor: Supervisor) -> None:
        """Stop a replica in the background: its requests may take their time. What replaces it under the same id
        starts after that."""
        logger.info("stopping replica %s", id)
        del self._running[id]

        async def stop() -> None:
            try:
                await supervisor.stop(DRAIN_GRACE)
                (self._data_dir / "progress" / f"{id}.json").unlink(missing_ok=True)
            finally:
                del self._stopping[id]
                self._changed.set()

        self._stopping[id] = supervisor, asyncio.get_running_loop().create_task(stop())

    async def _refuse(self, replicas: list[DesiredReplica]) -> None:
        """Say in presence what this node will not run, as long as it is wanted."""
        for id in self._refused.keys() - {replica.id for replica in replicas}:
            await self._refused.pop(id).stop()
        for desired in replicas:
            if desired.id in self._refused:
                continue
            logger.error("refusing replica %r with engine %r", desired.id, desired.engine)
            if not _REPLICA_ID.fullmatch(desired.id):
                continue  # what has no proper name can't be spoken of on the fabric
            error = f"this node runs no engine {desired.engine!r}, only {', '.join(sorted(ALLOWED_ENGINES))}"
            description = describe(desired, self.node, self._settings)
            announcer = Announcer(self._fabric, msgspec.structs.replace(description, state="failed", error=error))
            self._refused[desired.id] = announcer
            await announcer.start()

    # -- the node itself -----------------------------------------------------------------------------------

    def _describe(self) -> Node:
        draining = self._desired is not None and self._desired.drain
        return Node(
            id=self.node,
            region=self._settings.region,
            site=self._settings.site,
            state="draining" if draining else "ready",
            devices=self._devices,
            rtt_ms=self._rtt_ms,
            version=__version__,
        )

    async def _measure_rtt(self) -> None:
        """The way to the fabric's server and back, every few seconds."""
        while True:
            started = time.monotonic()
            if self._fabric.connected and await self._fabric.flush():
                self._rtt_ms = round((time.monotonic() - started) * 1000, 2)
            await asyncio.sleep(_RTT_INTERVAL)

    async def _renew_credentials(self) -> None:
        """Renew at half of their remaining life, in the file that this node's processes connect with."""
        while True:
            try:
                credentials = Credentials.load(self._credentials)
                if credentials.expires is None:
                    return
                await asyncio.sleep(max(0.0, (credentials.expires - time.time()) / 2))
                (await renew(self._fabric, self.node, credentials)).save(self._credentials)
            except Exception as error:
                logger.warning("credentials can't be renewed, again in %.0f s: %s", _RENEWAL_RETRY, error)
                await asyncio.sleep(_RENEWAL_RETRY)


async def run_agent(credentials: Path, node: str, settings: Settings, data_dir: Path, stop: asyncio.Event) -> None:
    """Run a node's agent until `stop` is set.

    Raises:
        SetupError: the fabric can't be reached.
    """
    fabric = await Fabric.connect(credentials, name=f"agent {node}")
    agent = Agent(fabric, node, settings, credentials=credentials, data_dir=data_dir)
    try:
        await agent.start()
        await stop.wait()
    finally:
        await agent.stop()
        await fabric.close()
