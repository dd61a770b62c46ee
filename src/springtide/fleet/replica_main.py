"""A replica's process: loads an engine, hosts it, and leaves in order. The only place of the fleet that knows which
engines there are, and the only one that imports a real one, when it is asked for it."""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop

from springtide.core.cluster import DesiredReplica, Replica
from springtide.core.config import Settings, load_settings
from springtide.core.engine_api import Engine
from springtide.core.errors import SetupError, SpringtideError
from springtide.core.log import setup_logging
from springtide.fabric.connection import Fabric
from springtide.fleet.announcer import Announcer
from springtide.fleet.children import watch_parent
from springtide.fleet.mock_engine import MockConfig, MockEngine
from springtide.fleet.mock_text import MockTokenizer
from springtide.fleet.progress import ProgressFile
from springtide.fleet.replica_host import ReplicaHost
from springtide.text.tokenizer import TokenizerLike

logger = logging.getLogger(__name__)

DRAIN_GRACE = 30.0  # seconds that running requests get to finish when the replica is asked to end
Progress = Callable[[str, int, int | None], None]
T = TypeVar("T")


async def run_replica(
    credentials: Path,
    node: str,
    desired: DesiredReplica,
    settings: Settings,
    stop: asyncio.Event,
    *,
    grace: float = DRAIN_GRACE,
    at_once: asyncio.Event | None = None,
) -> None:
    """Run one replica until `stop` is set and its requests have finished, at most `grace` seconds later;
    `at_once` cuts that short.

    Raises:
        SetupError: the model can't be had or the engine can't be set up.
        SpringtideError: the engine died; every open request has been told.
    """
    at_once = at_once or asyncio.Event()
    fabric = await Fabric.connect(credentials, name=f"replica {desired.id}")
    announcer = Announcer(fabric, describe(desired, node, settings))
    progress = ProgressFile(settings.data_path, desired.id)
    try:
        await announcer.start()
        loading = _in_thread(lambda: load_engine(desired, settings, progress))
        if not await _first(loading, stop):
            return
        engine, tokenizer = loading.result()
        host = ReplicaHost(fabric, announcer, engine, tokenizer, step_timeout=settings.step_timeout)
        await _serve(host, progress, stop, at_once, grace)
    finally:
        await announcer.stop()
        await fabric.close()


async def _serve(
    host: ReplicaHost, progress: ProgressFile, stop: asyncio.Event, at_once: asyncio.Event, grace: float
) -> None:
    await host.start()
    progress.ready()
    try:
        died = asyncio.ensure_future(host.died.wait())
        if await _first(died, stop):
            raise SpringtideError(host.epitaph)
        logger.info("stopping: finishing what runs, at most %.0f s", grace)
        draining = asyncio.ensure_future(host.drain(grace))
        await _first(draining, at_once)
    finally:
        await host.close()


def describe(desired: DesiredReplica, node: str, settings: Settings) -> Replica:
    """A replica that has just begun to start."""
    return Replica(
        id=desired.id,
        node=node,
        model=desired.model,
        engine=desired.engine,
        state="starting",
        deployment=desired.deployment,
        region=settings.region,
        site=settings.site,
        started=time.time(),
    )


def load_engine(desired: DesiredReplica, settings: Settings, progress: Progress) -> tuple[Engine, TokenizerLike]:
    """The engine and its tokenizer, ready to run.

    Raises:
        SetupError: no such engine, no such model, or options that make no sense.
    """
    if desired.engine == "mock":
        return MockEngine(desired.model, MockConfig.from_options(desired.options)), MockTokenizer()
    if desired.engine == "springtide":
        return _load_springtide(desired, settings, progress)
    raise SetupError(f"there is no engine {desired.engine!r}", hint="springtide or mock")


def _load_springtide(desired: DesiredReplica, settings: Settings, progress: Progress) -> tuple[Engine, TokenizerLike]:
    from springtide.core.store import ModelStore
    from springtide.engine.config import EngineConfig
    from springtide.engine.llm_engine import LLMEngine
    from springtide.text.tokenizer import Tokenizer

    config = EngineConfig.from_options(desired.options)
    files = ModelStore(settings.model_path).resolve(desired.source, progress=progress)
    progress("loading the tokenizer", 0, None)
    tokenizer = Tokenizer.load(files)
    return LLMEngine.from_files(files, config, progress=progress), tokenizer


def _in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run in a thread that nobody waits for when the process ends: loading a model can't be interrupted."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # from here on it can't be cancelled, only left behind
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return asyncio.wrap_future(future)


async def _first(work: asyncio.Future[T], event: asyncio.Event) -> bool:
    """Wait for one of the two; whether the work is done. If it is not, it is given up."""
    waiting = asyncio.ensure_future(event.wait())
    either: set[asyncio.Future[Any]] = {work, waiting}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return work.done() or not work.cancel()


def encode_spec(desired: DesiredReplica) -> str:
    """What to run, as one word of a command line."""
    return base64.urlsafe_b64encode(msgspec.json.encode(desired)).decode().rstrip("=")


def decode_spec(spec: str) -> DesiredReplica:
    """The inverse of `encode_spec`.

    Raises:
        SetupError: it is none.
    """
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(spec + "=" * (-len(spec) % 4)), type=DesiredReplica)
    except (ValueError, msgspec.MsgspecError) as error:
        raise SetupError(f"--spec is no replica: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: the exit code is 0 for an orderly end, 1 for any error, which is told in one sentence."""
    parser = argparse.ArgumentParser(prog="replica", description="Run one replica: one engine of one model.")
    parser.add_argument("--credentials", type=Path, required=True, help="fabric credentials file")
    parser.add_argument("--node", required=True, help="the node that it runs on")
    parser.add_argument("--spec", required=True, help="what to run: a DesiredReplica as base64url JSON")
    parser.add_argument("--data-dir", help="where logs, progress and models lie")
    parser.add_argument("--grace", type=float, default=DRAIN_GRACE, help="seconds to finish requests after SIGTERM")
    given = parser.parse_args(arguments)
    try:
        settings = load_settings({"data_dir": given.data_dir})
        setup_logging("replica", settings.log_level)
        desired = decode_spec(given.spec)
        uvloop.run(_until_signal(given.credentials, given.node, desired, settings, given.grace))
    except SpringtideError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


async def _until_signal(
    credentials: Path, node: str, desired: DesiredReplica, settings: Settings, grace: float
) -> None:
    """Run until SIGTERM or SIGINT asks to finish; a second one, or the parent's death, cuts that short."""
    loop = asyncio.get_running_loop()
    stop, at_once = asyncio.Event(), asyncio.Event()

    def ask() -> None:
        if stop.is_set():
            at_once.set()
        stop.set()

    def leave() -> None:
        stop.set()
        at_once.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    watch_parent(lambda: loop.call_soon_threadsafe(leave))
    await run_replica(credentials, node, desired, settings, stop, grace=grace, at_once=at_once)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # all is closed; the interpreter would take a second or two to take the model apart
