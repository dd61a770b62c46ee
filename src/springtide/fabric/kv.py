"""JetStream as we use it: buckets of latest values with compare-and-set, and the streams' configuration.

nats-py's key-value helper needs permissions (stream info) and consumers that nodes should not have, and its
watches take long to come back after a restart. Here a put is a publish with an acknowledgement, a get is a
direct get of one subject, a listing is a batched direct get, and a watch is a core subscription to the subject.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import nats.errors
from nats.aio.msg import Msg

from springtide.core.errors import SetupError
from springtide.fabric import subjects

if TYPE_CHECKING:  # the connection itself uses this module
    from springtide.fabric.connection import Fabric

_WRONG_LAST_SEQUENCE = 10071  # JetStream's error codes
_NAME_IN_USE = 10058
_MESSAGE_TOO_LARGE = 10054
_BATCH = 1000
_HEADER_FRAME = 12  # bytes around a message's headers
_SECOND = 10**9  # JetStream counts nanoseconds
_REPLICAS = 3  # of each stream, where there are so many servers: one may fail

PRESENCE_TTL_S = 10.0


class Conflict(Exception):
    """Somebody else wrote the key in between."""


class Unavailable(Exception):
    """JetStream did not answer, or not well. The write may or may not have happened."""


class TooLarge(Unavailable):
    """The message is larger than the server takes: it was not sent, and never will be."""


class Entry(msgspec.Struct, frozen=True):
    """The latest of a key. `value` is None where it was deleted; `revision` then still serves compare-and-set.
    `stamp` is the server's time of the write, ISO 8601."""

    key: str
    value: bytes | None
    revision: int
    stamp: str
    headers: dict[str, str]


class _ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Config(msgspec.Struct, frozen=True):
    num_replicas: int = 1


class _Answer(msgspec.Struct):
    """What JetStream answers to a publish or an API call."""

    seq: int = 0
    duplicate: bool = False
    config: _Config = _Config()
    error: _ApiError | None = None


_answers = msgspec.json.Decoder(_Answer)


async def publish_stored(
    fabric: Fabric, subject: str, data: bytes, *, headers: dict[str, str] | None = None, timeout: float = 2.0
) -> int:
    """Publish into a stream; the sequence number, once the server has stored it.

    Raises:
        Conflict: an expected sequence was not the last.
        TooLarge: more than the server takes in one message.
        Unavailable: no acknowledgement within `timeout` seconds.
    """
    return (await _ask(fabric, subject, data, headers, timeout)).seq


class Bucket:
    """Latest values by key. Keys are one or more tokens, joined by dots."""

    def __init__(self, fabric: Fabric, name: str) -> None:
        self.name = name
        self._fabric = fabric
        self._prefix = subjects.bucket_subject(name, "")

    def key_of(self, subject: str) -> str:
        return subject.removeprefix(self._prefix)

    async def put(self, key: str, value: bytes, *, expect: int | None = None, timeout: float = 2.0) -> int:
        """Write, and return the new revision. With `expect`, only if that is still the key's revision (0: it was
        never written).

        Raises:
            Conflict, Unavailable
        """
        headers = None if expect is None else {"Nats-Expected-Last-Subject-Sequence": str(expect)}
        return await publish_stored(self._fabric, self._prefix + key, value, headers=headers, timeout=timeout)

    async def delete(self, key: str, *, timeout: float = 2.0) -> None:
        """Leave a marker that the key is gone.

        Raises:
            Unavailable
        """
        await publish_stored(self._fabric, self._prefix + key, b"", headers={"KV-Operation": "DEL"}, timeout=timeout)

    async def get(self, key: str, *, timeout: float = 2.0) -> Entry | None:
        """The latest of `key`; None if it was never written.

        Raises:
            Unavailable
        """
        try:
            message = await self._fabric.request(subjects.direct_get_subject(self.name, key), timeout=timeout)
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"bucket {self.name} does not answer: {error!r}") from None
        headers = dict(message.headers or {})
        if headers.get("Status") == "404":
            return None
        if "Nats-Sequence" not in headers:
            raise Unavailable(f"bucket {self.name} answered {headers}")
        return self._entry(message)

    async def entries(self, *, timeout: float = 5.0) -> list[Entry]:
        """The latest of every key, deleted ones left out, oldest write first.

        Raises:
            Unavailable
        """
        found: list[Entry] = []
        sequence, more = 1, True
        while more:
            page, more = await self._page(sequence, timeout)
            found += page
            sequence = page[-1].revision + 1 if page else sequence
        latest = {entry.key: entry for entry in found}  # a key written while we read comes twice
        return [entry for entry in latest.values() if entry.value is not None]

    async def _page(self, sequence: int, timeout: float) -> tuple[list[Entry], bool]:
        """Up to _BATCH entries from `sequence` on, and whether there are more."""
        page: list[Entry] = []
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def receive(message: Msg) -> None:
            headers = message.headers or {}
            if "Nats-Sequence" in headers:
                page.append(self._entry(message))
            elif not done.done():
                status = headers.get("Status")
                if status in ("204", "404"):
                    done.set_result(status == "204" and int(headers.get("Nats-Num-Pending", 0)) > 0)
                else:
                    done.set_exception(Unavailable(f"bucket {self.name} answered {headers}"))

        inbox = self._fabric.nc.new_inbox()
        subscription = await self._fabric.subscribe(inbox, receive)
        query = {"seq": sequence, "batch": _BATCH, "next_by_subj": f"{self._prefix}>"}
        subject = f"$JS.API.DIRECT.GET.{subjects.bucket_stream(self.name)}"
        try:
            await self._fabric.nc.publish(subject, msgspec.json.encode(query), reply=inbox)
            async with asyncio.timeout(timeout):
                more = await done
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"bucket {self.name} does not answer: {error!r}") from None
        finally:
            await subscription.unsubscribe()
        return page, more and bool(page)

    def _entry(self, message: Msg) -> Entry:
        headers = dict(message.headers or {})
        gone = headers.get("KV-Operation") in ("DEL", "PURGE")
        return Entry(
            key=self.key_of(headers["Nats-Subject"]),
            value=None if gone else message.data,
            revision=int(headers["Nats-Sequence"]),
            stamp=headers.get("Nats-Time-Stamp", ""),
            headers=headers,
        )


def _bucket_config(name: str, *, memory: bool = False, max_age_s: float = 0) -> dict[str, Any]:
    return {
        "name": subjects.bucket_stream(name),
        "subjects": [subjects.bucket_subject(name, ">")],
        "retention": "limits",
        "storage": "memory" if memory else "file",
        "max_msgs_per_subject": 1,
        "max_age": int(max_age_s * _SECOND),
        "discard": "new",
        "allow_direct": True,
        "deny_delete": True,
        "allow_rollup_hdrs": False,  # one who may write one key could else delete all the others with it
        # Heartbeats want no answer; without one, a node can't have it sent to a subject that is not its own.
        "no_ack": memory,
    }


_USAGE_CONFIG: dict[str, Any] = {
    "name": subjects.USAGE_STREAM,
    "subjects": [subjects.USAGE_SUBJECT],
    "retention": "workqueue",  # a record is kept until the ledger has it, however long that takes
    "storage": "file",
    "discard": "new",
    "duplicate_window": 3600 * _SECOND,
}

_STREAMS = [
    _bucket_config(subjects.PRESENCE, memory=True, max_age_s=PRESENCE_TTL_S),
    *(
        _bucket_config(name)
        for name in (
            subjects.DESIRED,
            subjects.DEPLOYMENTS,
            subjects.KEYS,
            subjects.INTENTS,
            subjects.LEADERS,
            subjects.JOIN_TOKENS,
            subjects.MEMBERS,
        )
    ),
    _USAGE_CONFIG,
]


async def create_buckets_and_streams(fabric: Fabric, *, patience: float = 30.0) -> None:
    """Make what is missing and bring the rest to this configuration. Where the credentials name three servers or more,
    three keep everything.

    Raises:
        SetupError: JetStream still refuses or is silent after `patience` seconds.
    """
    replicas = _REPLICAS if len(fabric.urls) >= _REPLICAS else 1
    try:
        async with asyncio.timeout(patience):
            for config in _STREAMS:
                await _create_stream(fabric, {**config, "num_replicas": replicas})
    except TimeoutError:
        raise SetupError(
            "the fabric's store does not answer", hint="is JetStream on, and its disk not full? see the server's log"
        ) from None


async def _create_stream(fabric: Fabric, config: dict[str, Any]) -> None:
    """A just-started server may not answer at once: try until the caller's patience ends."""
    verb, wait = "CREATE", 0.05
    while True:
        try:
            if verb == "UPDATE":
                config = await _with_all_replicas(fabric, config)
            await _ask(fabric, f"$JS.API.STREAM.{verb}.{config['name']}", msgspec.json.encode(config), None, 2.0)
            return
        except Conflict:
            verb = "UPDATE"
        except Unavailable:
            await asyncio.sleep(wait)
            wait = min(1.0, 2 * wait)


async def _with_all_replicas(fabric: Fabric, config: dict[str, Any]) -> dict[str, Any]:
    """Never fewer than there are: who knows of one server only must not undo what the others made.

    Raises:
        Unavailable
    """
    answer = await _ask(fabric, f"$JS.API.STREAM.INFO.{config['name']}", b"", None, 2.0)
    return {**config, "num_replicas": max(config["num_replicas"], answer.config.num_replicas)}


async def _ask(fabric: Fabric, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float) -> _Answer:
    # Headers count: nats-py looks at the data alone, and a server cuts the connection of one that sends too much.
    size = len(data) + sum(len(name) + len(value) + 4 for name, value in (headers or {}).items()) + _HEADER_FRAME
    if fabric.connected and size > fabric.nc.max_payload:
        raise TooLarge(f"{subject}: {size} bytes are more than the {fabric.nc.max_payload} of the server")
    try:
        message = await fabric.request(subject, data, timeout=timeout, headers=headers)
        answer = _answers.decode(message.data)
    except (TimeoutError, nats.errors.Error, msgspec.MsgspecError) as error:
        raise Unavailable(f"{subject} is not acknowledged: {error!r}") from None
    if answer.error is None:
        return answer
    if answer.error.err_code in (_WRONG_LAST_SEQUENCE, _NAME_IN_USE):
        raise Conflict(answer.error.description)
    if answer.error.err_code == _MESSAGE_TOO_LARGE:
        raise TooLarge(f"{subject}: {answer.error.description}")
    raise Unavailable(f"{subject}: {answer.error.description}")
