"""Three servers, of which one may die in the middle of everything."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from springtide.core.errors import SetupError
from springtide.core.request import Request
from springtide.fabric import server as server_module
from springtide.fabric import subjects
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric
from springtide.fabric.server import Cluster, NatsServer
from springtide.fabric.streams import ClientStream, StreamHub, StreamKey
from springtide.fabric.usage import UsageReader, UsageWriter
from tests.fabric.conftest import make_request, until
from tests.fabric.stage import DONE, Replica, read, tokens
from tests.fabric.test_usage import drain, usage


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Three:
    """Three servers and what connects to them."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority.open(directory / "authority")
        ports = free_ports(3)
        routes = [f"127.0.0.1:{port}" for port in ports]
        self.servers = [
            NatsServer(
                directory / f"nats-{number}",
                self.authority,
                cluster=Cluster(server=f"s{number}", port=port, routes=routes),
            )
            for number, port in enumerate(ports)
        ]

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def of(self, fabric: Fabric) -> NatsServer:
        """The server that this process is connected to."""
        assert fabric.nc.connected_url is not None
        (server,) = [server for server in self.servers if server.port == fabric.nc.connected_url.port]
        return server

    async def leader(self, fabric: Fabric, stream: str) -> NatsServer:
        info = await fabric.js.stream_info(stream)
        assert info.config.num_replicas == 3 and info.cluster is not None and info.cluster.leader is not None
        return self.servers[int(info.cluster.leader.removeprefix("s"))]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Three]:
    three = Three(tmp_path)
    for server in three.servers:
        server.start()
    yield three
    for server in three.servers:
        server.stop()


async def test_streams_go_on_and_no_record_is_lost_when_servers_die(three: Three, tmp_path: Path) -> None:
    gateway = await Fabric.connect(three.authority.platform_credentials("gateway", three.urls), name="gateway")
    await gateway.prepare()
    node = await Fabric.connect(three.authority.local_node("A", three.urls), name="A")
    hub, replica = StreamHub(gateway, "g"), Replica(node)
    await hub.start()
    await replica.server.start()
    await node.flush()
    writer = UsageWriter(gateway, tmp_path / "spool")
    speakers: list[asyncio.Future[None]] = []

    def speak(key: StreamKey, request: Request) -> None:
        replica.server.emit(key, [])
        speakers.append(asyncio.ensure_future(replica.tell(key, range(150), DONE, pause=0.01)))

    replica.on_open = speak

    async def serve(stream: ClientStream) -> list[int]:
        said = tokens(await read(stream))
        await writer.record(usage(int(stream.key.request_id)))
        return said

    victims = [three.of(gateway), three.of(node), await three.leader(gateway, subjects.USAGE_STREAM)]
    number = 0
    for victim in dict.fromkeys(victims):
        streams = [await hub.open(make_request(str(number + index)), 1, "A", "r") for index in range(6)]
        number += len(streams)
        served = [asyncio.ensure_future(serve(stream)) for stream in streams]
        await asyncio.sleep(0.3)
        victim.kill()
        assert await asyncio.gather(*served) == [list(range(150))] * len(streams)
        victim.start()
        await until(lambda: gateway.connected and node.connected)
    await asyncio.gather(*speakers)
    records = await drain(UsageReader(gateway), number, patience=60)
    assert Counter(records) == Counter(f"r{index}" for index in range(number))
    assert hub.counters["lost"] == 0 and replica.cancelled == []
    await writer.stop()
    await hub.close()
    await replica.server.close()
    await gateway.close()
    await node.close()


async def test_who_knows_of_one_server_only_does_not_undo_the_copies(three: Three) -> None:
    gateway = await Fabric.connect(three.authority.platform_credentials("gateway", three.urls), name="gateway")
    await gateway.prepare()
    narrow = await Fabric.connect(three.authority.platform_credentials("narrow", three.urls[:1]), name="narrow")
    await narrow.prepare()
    await three.leader(narrow, subjects.USAGE_STREAM)  # looks how many copies there are
    await narrow.close()
    await gateway.close()


def test_a_stranger_is_not_let_into_the_cluster(three: Three, tmp_path: Path) -> None:
    """Its certificate is from another authority: it may know the addresses, and gets nowhere."""
    (port,) = free_ports(1)
    stranger = NatsServer(
        tmp_path / "stranger",
        Authority.open(tmp_path / "another"),
        cluster=Cluster(server="s9", port=port, routes=[f"127.0.0.1:{three.servers[0]._cluster.port}"]),  # type: ignore[union-attr]
    )
    stranger.start()
    try:
        log = three.servers[0].log_file
        for _ in range(1000):
            if "TLS route handshake error" in log.read_text():
                break
            time.sleep(0.01)
        assert "TLS route handshake error" in log.read_text()
    finally:
        stranger.stop()


def test_a_cluster_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_PORT_PATIENCE_S", 0.1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = NatsServer(
            tmp_path / "nats",
            Authority.open(tmp_path / "authority"),
            cluster=Cluster(server="s0", port=port, routes=[]),
        )
        with pytest.raises(SetupError, match=rf"port {port} .* in use .*cluster's port"):
            server.start()
