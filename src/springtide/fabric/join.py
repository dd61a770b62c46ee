"""How a machine becomes a node: a join token for credentials, once; and new credentials for ending ones.

The newcomer makes its own key pair; only the public half leaves it. It checks the server against the CA in the
token before it says anything. A token is used by compare-and-set; the same key may ask again with it, since an
answer can be lost. A node's name belongs to the first key that joined under it, until an operator forgets it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Collection

import msgspec
import nats.errors
from nats.aio.msg import Msg

from springtide.core import wire
from springtide.core.errors import SetupError
from springtide.fabric import nats_jwt, subjects
from springtide.fabric.authority import Authority
from springtide.fabric.connection import Fabric, Subscription
from springtide.fabric.credentials import Credentials, wants_tls
from springtide.fabric.join_token import JoinToken
from springtide.fabric.kv import Bucket, Conflict, Unavailable
from springtide.fabric.nats_jwt import KeyPair

log = logging.getLogger(__name__)

_QUEUE = "join"
_ANSWER_S = 2.0
_ATTEMPTS = 5


class _Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A newcomer, or a node, wants credentials for its key."""

    node: str
    public_key: str


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A signed token, or why not. `again`: the reason may pass by itself."""

    jwt: str = ""
    error: str = ""
    hint: str = ""
    again: bool = False


class _Use(msgspec.Struct, frozen=True, kw_only=True):
    """What a used join token was used for."""

    node: str
    public_key: str


class JoinServer:
    """Answers newcomers and nodes. Several may run; each question reaches one. `local_nodes` are those of the
    authority's own machine: they need no token to be there, and nobody else can join under their names.
    `counters`: joined, renewed, refused."""

    def __init__(
        self, fabric: Fabric, authority: Authority, *, ttl: float = 3600, local_nodes: Collection[str] = ()
    ) -> None:
        self._fabric = fabric
        self._authority = authority
        self._ttl = ttl
        self._local_keys = {node: authority.local_key(node).public for node in local_nodes}
        self._tokens = Bucket(fabric, subjects.JOIN_TOKENS)
        self._members = Bucket(fabric, subjects.MEMBERS)
        self._subscriptions: list[Subscription] = []
        self.counters: Counter[str] = Counter()

    async def start(self) -> None:
        self._subscriptions = [
            await self._fabric.subscribe(subjects.join_subject("*"), self._on_join, queue=_QUEUE),
            await self._fabric.subscribe(subjects.renew_subject("*"), self._on_renew, queue=_QUEUE),
        ]

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    async def _on_join(self, message: Msg) -> None:
        token_id = message.subject.removeprefix(subjects.join_subject(""))
        await self._answer(message, subjects.join_inbox(token_id), self._join(token_id, message.data))

    async def _on_renew(self, message: Msg) -> None:
        node = message.subject.split(".")[2]
        await self._answer(message, subjects.node_inbox(node), self._renew(node, message.data))

    async def _answer(self, message: Msg, inbox: str, work: Awaitable[_Answer]) -> None:
        """Answer to the asker's own inbox only: our permissions are wider than its."""
        try:
            answer = await work
        except SetupError as error:
            answer = _Answer(error=error.message, hint=error.hint or "")
        except Unavailable as error:
            answer = _Answer(error=str(error), again=True)
        except msgspec.MsgspecError as error:
            answer = _Answer(error=f"the request can't be read: {error}")
        self.counters["refused"] += bool(answer.error)
        if message.reply.startswith(f"{inbox}."):
            await self._fabric.publish(message.reply, wire.pack(answer))

    async def _join(self, token_id: str, data: bytes) -> _Answer:
        ask = wire.unpack(data, _Ask)
        jwt = self._authority.node_credentials(ask.node, ask.public_key, ttl=self._ttl)  # checks both
        await self._use_token(token_id, ask)
        await self._claim_name(ask, "choose another name, or forget the old node first")
        self.counters["joined"] += 1
        log.info("node %s joined", ask.node)
        return _Answer(jwt=jwt)

    async def _renew(self, node: str, data: bytes) -> _Answer:
        ask = wire.unpack(data, _Ask)
        if ask.node != node:
            raise SetupError(f"node {node} asks for credentials of {ask.node}")
        await self._claim_name(ask, "join anew")
        self.counters["renewed"] += 1
        return _Answer(jwt=self._authority.node_credentials(node, ask.public_key, ttl=self._ttl))

    async def _use_token(self, token_id: str, ask: _Ask) -> None:
        use = _Use(node=ask.node, public_key=ask.public_key)
        try:
            await self._tokens.put(token_id, wire.pack(use), expect=0)
        except Conflict:
            entry = await self._tokens.get(token_id)
            if entry is None or entry.value is None or wire.unpack(entry.value, _Use) != use:
                raise SetupError("this join token was used already", hint="make a new one: node token") from None

    async def _claim_name(self, ask: _Ask, hint: str) -> None:
        """The name is this key's from now on, or was."""
        if ask.node in self._local_keys:
            if ask.public_key != self._local_keys[ask.node]:
                raise SetupError(f"the name {ask.node} belongs to another machine", hint=hint)
            return
        entry = await self._members.get(ask.node)
        if entry is None or entry.value is None:
            expect = 0 if entry is None else entry.revision
            try:
                await self._members.put(ask.node, ask.public_key.encode(), expect=expect)
                return
            except Conflict:
                entry = await self._members.get(ask.node)
        if entry is None or entry.value != ask.public_key.encode():
            raise SetupError(f"the name {ask.node} belongs to another machine", hint=hint)


async def forget_node(fabric: Fabric, node: str) -> None:
    """Give a node's name free. Its present credentials still end by themselves, and can't be renewed by another
    key once the name is taken again."""
    await Bucket(fabric, subjects.MEMBERS).delete(subjects.check_token("node", node))


async def join(
    token: str, node: str, urls: list[str] | None = None, *, previous: Credentials | None = None
) -> Credentials:
    """Become a node named `node`. `urls` replace those in the token, where this machine must dial others. A
    machine that was a node of that name shows its `previous` credentials: the name belongs to their key.

    Raises:
        SetupError: the token is none, ended, or was used; the name is taken; the server is not the one that
            made the token, can't be reached, or nobody answers.
    """
    decoded = JoinToken.decode(token)
    subjects.check_token("node", node)
    expires = nats_jwt.expiry(decoded.jwt)
    if expires is not None and expires < time.time():
        raise SetupError("this join token has expired", hint="make a new one: node token")
    urls = urls or decoded.urls
    ca_pem = decoded.ca_pem if wants_tls(urls) else ""
    bootstrap = Credentials(
        name=f"join-{decoded.id}",
        urls=urls,
        jwt=decoded.jwt,
        seed=decoded.seed,
        ca_pem=ca_pem,
        inbox_prefix=subjects.join_inbox(decoded.id),
    )
    key = KeyPair(previous.seed) if previous is not None else KeyPair.new_user()
    fabric = await Fabric.connect(bootstrap, name=f"join {node}")
    try:
        jwt = await _ask(fabric, subjects.join_subject(decoded.id), _Ask(node=node, public_key=key.public))
    finally:
        await fabric.close()
    return Credentials(
        name=node, urls=urls, jwt=jwt, seed=key.seed, ca_pem=ca_pem, inbox_prefix=subjects.node_inbox(node)
    )


async def renew(fabric: Fabric, node: str, credentials: Credentials) -> Credentials:
    """The same credentials with a new end. `fabric` must be connected with the present ones.

    Raises:
        SetupError: refused, or nobody answers (the present ones still hold until their end).
    """
    public_key = KeyPair(credentials.seed).public
    jwt = await _ask(fabric, subjects.renew_subject(node), _Ask(node=node, public_key=public_key))
    return msgspec.structs.replace(credentials, jwt=jwt)


async def _ask(fabric: Fabric, subject: str, ask: _Ask) -> str:
    """The signed token. Asks again where an answer may have been lost: asking is idempotent for one key."""
    reason, hint = "nobody answers", "does a controller run?"
    for attempt in range(_ATTEMPTS):
        if attempt:
            await asyncio.sleep(0.2 * 2**attempt)
        try:
            message = await fabric.request(subject, wire.pack(ask), timeout=_ANSWER_S)
        except nats.errors.Error as error:
            reason = f"nobody answers ({error})"
            continue
        answer = wire.unpack(message.data, _Answer)
        if answer.jwt:
            return answer.jwt
        reason, hint = answer.error, answer.hint
        if not answer.again:
            break
    raise SetupError(reason, hint=hint or None)
