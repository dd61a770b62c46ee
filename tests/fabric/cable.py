"""A cable between a process and a server, to be cut or pulled: a TCP proxy on loopback."""

from __future__ import annotations

import asyncio
import contextlib


class Cable:
    """Passes bytes on both ways. `cut` ends all connections, and both ends notice; after `freeze` no byte passes on
    those that are there, and nobody is told (half-open). New connections are not concerned."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._to = port
        self._server: asyncio.Server | None = None
        self._flows: list[tuple[asyncio.Event, asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Cable:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        flows, self._flows = self._flows, []
        for passes, *ends in flows:
            passes.set()
            for end in ends:
                end.transport.abort()

    def freeze(self) -> None:
        for passes, *_ in self._flows:
            passes.clear()

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        passes = asyncio.Event()
        passes.set()
        self._flows.append((passes, writer, far_writer))
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, sink, passes))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await passes.wait()
                sink.write(data)
                await sink.drain()
        with contextlib.suppress(OSError):
            sink.transport.abort()
