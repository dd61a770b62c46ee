"""A real NATS server, a real gateway on a free port, and a replica of a few lines behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from springtide.core.cluster import Deployment, KeyRecord
from springtide.core.config import Settings
from springtide.core.ids import new_id
from springtide.core.request import Usage
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.desired import Registry
from springtide.fabric.server import NatsServer
from springtide.gateway.limits import Limits
from springtide.gateway.server import run_gateway
from springtide.ledger.store import Ledger
from tests.gateway.replica import TinyReplica, speak

MODEL = "tiny"
LIMITS = Limits(header_timeout=1.0, body_timeout=1.0, heartbeat_every=0.2, grace=5.0)


async def until(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> Any:
    """Wait until `condition()` (awaited if it must be) is true, and return what it said."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        await asyncio.sleep(0.02)
    raise AssertionError(f"never came true: {what}")


class Cloud:
    """The fabric under test, and who was started on it."""

    def __init__(self, directory: Path, authority: Authority, nats: NatsServer) -> None:
        self.directory = directory
        self.authority = authority
        self.nats = nats
        self.platform: Fabric
        self.ledger: Ledger
        self.replicas: list[TinyReplica] = []
        self._fabrics: list[Fabric] = []

    async def start(self) -> None:
        urls = [self.nats.url]
        self.platform = await Fabric.connect(self.authority.platform_credentials("test", urls), name="test")
        self._fabrics.append(self.platform)
        await self.platform.prepare()
        self.ledger = await Ledger.open(self.database_url)

    async def stop(self) -> None:
        for replica in self.replicas:
            await replica.stop()
        await self.ledger.close()
        for fabric in self._fabrics:
            await fabric.close()

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.directory}/ledger.db"

    async def new_key(self, name: str = "test") -> tuple[KeyRecord, str]:
        """A key that every gateway here knows."""
        await self.ledger.put_tenant("default")
        record, plain = await self.ledger.create_key(name)
        await Registry(self.platform, "keys", KeyRecord).put(record.hash, record)
        return record, plain

    async def deploy(self, name: str) -> None:
        await Registry(self.platform, "deployments", Deployment).put(name, Deployment(name=name, source="mock"))

    async def add_replica(self, name: str, *, model: str = MODEL, **description: object) -> TinyReplica:
        node = f"node-of-{name}"
        fabric = await Fabric.connect(self.authority.local_node(node, [self.nats.url]), name=node)
        self._fabrics.append(fabric)
        replica = await TinyReplica(fabric, node, name, model, **description).start()
        self.replicas.append(replica)
        return replica

    async def remove_replica(self, replica: TinyReplica, *, goodbye: bool = True) -> None:
        self.replicas.remove(replica)
        await replica.stop(goodbye=goodbye)

    @asynccontextmanager
    async def gateway(
        self, *, limits: Limits = LIMITS, stop: asyncio.Event | None = None, **settings: object
    ) -> AsyncIterator[str]:
        """A gateway's base URL."""
        stop = stop or asyncio.Event()
        started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        file = self.directory / f"{new_id('gateway')}.creds"
        self.authority.platform_credentials("gateway", [self.nats.url]).save(file)
        chosen = Settings(data_dir=str(self.directory), port=0, database_url=self.database_url, **settings)  # type: ignore[arg-type]
        task = asyncio.create_task(
            run_gateway(file, chosen, self.directory, stop=stop, ready=started.set_result, limits=limits)
        )
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        try:
            yield started.result()
        finally:
            stop.set()
            await task

    async def usage(self, request_id: str) -> Usage:
        """The usage record of a request, once it is in the ledger."""

        async def look() -> Usage | None:
            found = [usage for usage in await self.ledger.list_usage() if usage.request_id == request_id]
            return found[0] if found else None

        record: Usage = await until(look, f"usage of {request_id}")
        return record

    async def ledger_usage(self) -> Usage:
        """The only usage record that there is, once it is in the ledger."""
        (record,) = await until(self.ledger.list_usage, "a usage")
        return record  # type: ignore[no-any-return]


@asynccontextmanager
async def running_cloud(directory: Path) -> AsyncIterator[Cloud]:
    authority = Authority.open(directory / "fabric")
    nats = NatsServer(directory / "nats", authority)
    nats.start()
    cloud = Cloud(directory, authority, nats)
    try:
        await cloud.start()
        yield cloud
        await cloud.stop()
    finally:
        nats.stop()


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    """A fabric of a test's own."""
    async with running_cloud(tmp_path) as cloud:
        yield cloud


class Edge:
    """A running gateway with one replica, and a client that has a key."""

    def __init__(self, cloud: Cloud, replica: TinyReplica, url: str, key: str) -> None:
        self.cloud = cloud
        self.replica = replica
        self.url = url
        self.key = key
        self.port = int(url.rpartition(":")[2])
        self.client = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30)

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def chat_with(self, headers: dict[str, str], **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **fields})

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        page = (await self.client.get("/metrics")).text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        rows = [row for row in page.splitlines() if row.partition("{")[0].partition(" ")[0] == name]
        return sum(float(row.rpartition(" ")[2]) for row in rows if all(label in row for label in wanted))


@asynccontextmanager
async def running_edge(cloud: Cloud, **settings: object) -> AsyncIterator[Edge]:
    _, key = await cloud.new_key()
    replica = await cloud.add_replica("r1")
    async with cloud.gateway(**settings) as url:  # type: ignore[arg-type]
        edge = Edge(cloud, replica, url, key)
        async with edge.client:
            await until(lambda: _is_ready(edge), "the gateway is ready")
            yield edge


async def _is_ready(edge: Edge) -> bool:
    return (await edge.client.get("/ready")).status_code == 200


@pytest.fixture
async def edge(cloud: Cloud) -> AsyncIterator[Edge]:
    async with running_edge(cloud, silent_wait=0.3) as edge:
        yield edge


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lasting_edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    async with running_cloud(tmp_path_factory.mktemp("cloud")) as cloud, running_edge(cloud) as edge:
        yield edge


@pytest.fixture
def shared_edge(lasting_edge: Edge) -> Edge:
    """One gateway for a whole module, for tests that leave it as they found it (mark: loop_scope "module")."""
    lasting_edge.replica.behaviour = speak
    lasting_edge.replica.opened.clear()
    lasting_edge.replica.cancelled.clear()
    return lasting_edge


async def raw(port: int, data: bytes, *, timeout: float = 20.0) -> bytes:
    """Send bytes as they are; what comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), timeout)
    finally:
        writer.close()
