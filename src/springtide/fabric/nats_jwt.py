"""NATS' decentralised credentials: JSON web tokens signed with nkeys (Ed25519). No files, no sockets.

An operator signs accounts, an account (or its signing key) signs users; the server checks the chain and the
permissions that the user's token carries, so that new credentials need no change at the server.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import nkeys

_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
_UNLIMITED = -1


class KeyPair:
    """An nkey pair: `seed` is secret, `public` is the name that the other side knows it by."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self._pair = nkeys.from_seed(bytearray(seed.encode()))
        self.public: str = self._pair.public_key.decode()

    @classmethod
    def new_operator(cls) -> KeyPair:
        return cls(_seed(os.urandom(32), nkeys.PREFIX_BYTE_OPERATOR))

    @classmethod
    def new_account(cls) -> KeyPair:
        return cls(_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT))

    @classmethod
    def new_user(cls) -> KeyPair:
        return cls.of_user(os.urandom(32))

    @classmethod
    def of_user(cls, secret: bytes) -> KeyPair:
        """A user's pair from 32 secret bytes."""
        return cls(_seed(secret, nkeys.PREFIX_BYTE_USER))

    def sign(self, data: bytes) -> bytes:
        signature: bytes = self._pair.sign(data)
        return signature


def operator_jwt(operator: KeyPair, system_account: str) -> str:
    claims = {"type": "operator", "version": 2, "system_account": system_account}
    return _signed(operator, operator.public, "springtide", claims)


def account_jwt(
    operator: KeyPair, account: str, name: str, *, jetstream: bool, signing_keys: Sequence[str] = ()
) -> str:
    """An account without limits; with `jetstream` it may store."""
    limits: dict[str, Any] = dict.fromkeys(
        ("subs", "data", "payload", "imports", "exports", "conn", "leaf"), _UNLIMITED
    )
    limits["wildcards"] = True
    if jetstream:
        limits |= dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), _UNLIMITED)
    claims = {"type": "account", "version": 2, "limits": limits, "signing_keys": list(signing_keys)}
    return _signed(operator, account, name, claims)


def user_jwt(
    signer: KeyPair,
    account: str,
    user: str,
    name: str,
    *,
    publish: Sequence[str] | None = None,
    subscribe: Sequence[str] | None = None,
    expires: float | None = None,
) -> str:
    """A user of `account` (public keys both); None permits every subject. `expires` in unix seconds."""
    claims: dict[str, Any] = {"type": "user", "version": 2}
    claims |= dict.fromkeys(("subs", "data", "payload"), _UNLIMITED)
    if publish is not None:
        claims["pub"] = {"allow": list(publish)}
    if subscribe is not None:
        claims["sub"] = {"allow": list(subscribe)}
    if signer.public != account:
        claims["issuer_account"] = account
    return _signed(signer, user, name, claims, expires)


def expiry(jwt: str) -> float | None:
    """When a token ends (unix seconds), unverified; None if it does not."""
    payload = jwt.split(".")[1]
    claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    value = claims.get("exp")
    return None if value is None else float(value)


def is_user_key(public_key: str) -> bool:
    """Whether this is the public half of a user's nkey."""
    try:
        raw = base64.b32decode(public_key + "=" * (-len(public_key) % 8))
    except ValueError:
        return False
    checksum = int.from_bytes(raw[-2:], "little")
    return len(raw) == 35 and raw[0] == nkeys.PREFIX_BYTE_USER and nkeys.crc16(raw[:-2]) == checksum


def _signed(issuer: KeyPair, subject: str, name: str, nats: dict[str, Any], expires: float | None = None) -> str:
    claims: dict[str, Any] = {
        "iat": int(time.time()),
        "iss": issuer.public,
        "sub": subject,
        "name": name,
        "nats": nats,
    }
    if expires is not None:
        claims["exp"] = int(expires)
    digest = hashlib.sha512(msgspec.json.encode(claims)).digest()[:32]
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    body = f"{_base64url(msgspec.json.encode(_HEADER))}.{_base64url(msgspec.json.encode(claims))}"
    return f"{body}.{_base64url(issuer.sign(body.encode()))}"


def _seed(secret: bytes, prefix: int) -> str:
    text: bytes = nkeys.encode_seed(secret, prefix)
    return text.decode()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
