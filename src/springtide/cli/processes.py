"""The single processes, as `up` starts them and as production units do."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from springtide.cli.options import DataDir, settings
from springtide.cli.up import LOCAL_NODE
from springtide.core.config import Settings
from springtide.core.log import setup_logging

Credentials = Annotated[Path, typer.Option("--credentials", help="Fabric credentials file.", exists=True)]


def run_until_signal(name: str, chosen: Settings, work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `work(stop)` in a fresh loop; SIGTERM, SIGINT and the death of the parent set `stop`."""
    import uvloop

    from springtide.fleet.children import watch_parent

    setup_logging(name, chosen.log_level)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        watch_parent(lambda: loop.call_soon_threadsafe(stop.set))
        await work(stop)

    uvloop.run(main())


def gateway(
    credentials: Credentials,
    with_controller: Annotated[bool, typer.Option("--with-controller", help="Run a controller beside it.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Run one gateway: the public HTTP edge."""
    from springtide.gateway.limits import DEFAULT_LIMITS
    from springtide.gateway.server import run_gateway

    chosen = settings(data_dir=data_dir)

    async def work(stop: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if with_controller:
                await stack.enter_async_context(_controller(credentials, chosen))
            limits = msgspec.structs.replace(DEFAULT_LIMITS, grace=chosen.grace)
            await run_gateway(credentials, chosen, chosen.data_path, stop=stop, limits=limits)

    run_until_signal("gateway", chosen, work)


def controller(credentials: Credentials, data_dir: DataDir = None) -> None:
    """Run one controller; several elect a leader."""
    chosen = settings(data_dir=data_dir)

    async def work(stop: asyncio.Event) -> None:
        async with _controller(credentials, chosen):
            await stop.wait()

    run_until_signal("controller", chosen, work)


@contextlib.asynccontextmanager
async def _controller(credentials: Path, chosen: Settings) -> AsyncIterator[None]:
    """A controller with what only it may do: sign node credentials, hear the server's own events."""
    from springtide.core.ids import new_id
    from springtide.fabric.authority import Authority
    from springtide.fabric.connection import Fabric
    from springtide.fabric.join import JoinServer
    from springtide.fabric.presence import DisconnectWatch
    from springtide.fleet.controller import Controller

    fabric = await Fabric.connect(credentials, name="controller")
    await fabric.prepare()
    authority = Authority.open(chosen.data_path / "fabric")
    parts: list[Controller | JoinServer | DisconnectWatch] = [
        Controller(fabric, new_id("controller")),
        JoinServer(fabric, authority, local_nodes=[LOCAL_NODE]),
        DisconnectWatch(fabric, authority.system_credentials(fabric.urls)),
    ]
    try:
        for part in parts:
            await part.start()
        yield
    finally:
        for part in reversed(parts):
            await part.stop()
        await fabric.close()


def agent(
    credentials: Credentials,
    node: Annotated[str, typer.Option(help="This machine's name in the fleet.")],
    data_dir: DataDir = None,
) -> None:
    """Run the agent of one node: starts and keeps the replicas that the controller wants here."""
    from springtide.fleet.agent import run_agent

    chosen = settings(data_dir=data_dir)
    run_until_signal("agent", chosen, lambda stop: run_agent(credentials, node, chosen, chosen.data_path, stop))


def replica(
    credentials: Credentials,
    node: Annotated[str, typer.Option(help="The node that it runs on.")],
    spec: Annotated[str, typer.Option(help="What to run: a DesiredReplica as base64url JSON.")],
    data_dir: DataDir = None,
) -> None:
    """Run one replica: one engine of one model."""
    from springtide.fleet.replica_main import main

    arguments = ["--credentials", str(credentials), "--node", node, "--spec", spec]
    raise typer.Exit(main(arguments + (["--data-dir", data_dir] if data_dir else [])))
