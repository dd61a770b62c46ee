"""Who may speak on the fabric: the keys that sign credentials, and the certificate authority of its servers.

Everything secret lies in one file of mode 0600. Whoever holds it is the platform; nodes never see it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from springtide.core.errors import SetupError
from springtide.fabric import certificates, nats_jwt, subjects
from springtide.fabric.credentials import Credentials, wants_tls
from springtide.fabric.files import private_directory, write_private
from springtide.fabric.join_token import JoinToken
from springtide.fabric.nats_jwt import KeyPair

__all__ = ["Authority", "Credentials"]


class _Secrets(msgspec.Struct, frozen=True):
    """The file's content. Users are signed by `signing`, so that `account` itself never has to be at hand."""

    operator: str
    system: str
    account: str
    signing: str
    ca_pem: str
    ca_key_pem: str

    @classmethod
    def new(cls) -> _Secrets:
        ca_pem, ca_key_pem = certificates.new_ca()
        system, account, signing = (KeyPair.new_account().seed for _ in range(3))
        return cls(KeyPair.new_operator().seed, system, account, signing, ca_pem, ca_key_pem)


class Authority:
    """Signs credentials for platform processes, nodes and newcomers."""

    def __init__(self, directory: Path, values: _Secrets) -> None:
        self.directory = directory
        self.ca_pem = values.ca_pem
        self._ca_key_pem = values.ca_key_pem
        self._operator = KeyPair(values.operator)
        self._system = KeyPair(values.system)
        self._account = KeyPair(values.account)
        self._signing = KeyPair(values.signing)

    @classmethod
    def open(cls, directory: Path) -> Authority:
        """Load from `directory`, or create at first use. Safe against two processes doing so at once.

        Raises:
            SetupError: the directory can't be written, the file is broken.
        """
        file = private_directory(directory) / "authority.json"
        if not file.exists():
            write_private(file, msgspec.json.encode(_Secrets.new()), replace=False)
        try:
            return cls(directory, msgspec.json.decode(file.read_bytes(), type=_Secrets))
        except (OSError, msgspec.MsgspecError) as error:
            raise SetupError(f"can't read the fabric's keys {file}: {error}", hint="restore it from a backup") from None

    # What the server needs.

    @property
    def account(self) -> str:
        """Our account's public key."""
        return self._account.public

    def server_config(self) -> str:
        """The part of a nats-server configuration that says whom to trust."""
        system = nats_jwt.account_jwt(self._operator, self._system.public, "SYS", jetstream=False)
        account = nats_jwt.account_jwt(
            self._operator, self.account, "springtide", jetstream=True, signing_keys=[self._signing.public]
        )
        return (
            f"operator: {nats_jwt.operator_jwt(self._operator, self._system.public)}\n"
            f"system_account: {self._system.public}\n"
            f"resolver: MEMORY\n"
            f"resolver_preload: {{ {self._system.public}: {system}\n {self.account}: {account} }}\n"
        )

    def server_certificate(self, hosts: Iterable[str]) -> tuple[Path, Path]:
        """Certificate and key files for a server called `hosts`; kept while they are good."""
        names = list(hosts)
        certificate, key = self.directory / "server.pem", self.directory / "server.key"
        if not (certificate.exists() and key.exists() and certificates.still_good(certificate.read_text(), names)):
            certificate_pem, key_pem = certificates.new_server_certificate(self.ca_pem, self._ca_key_pem, names)
            write_private(key, key_pem.encode())
            write_private(certificate, certificate_pem.encode())
        return certificate, key

    # What clients need.

    def platform_credentials(self, name: str, urls: list[str]) -> Credentials:
        """For gateways and controllers: everything in our account, without an end."""
        subjects.check_token("platform process", name)
        return self._credentials(self._signing, self.account, name, urls)

    def system_credentials(self, urls: list[str]) -> Credentials:
        """For the server's own events."""
        return self._credentials(self._system, self._system.public, "system", urls)

    def node_credentials(self, node: str, public_key: str, *, ttl: float = 3600) -> str:
        """A token for a node's key that names only that node's subjects and inbox, good for `ttl` seconds.

        Raises:
            SetupError: the node's id or key is none.
        """
        subjects.check_token("node", node)
        if not nats_jwt.is_user_key(public_key):
            raise SetupError(f"the key of node {node} is not a user's public key")
        return nats_jwt.user_jwt(
            self._signing,
            self.account,
            public_key,
            f"node.{node}",
            publish=subjects.node_may_publish(node),
            subscribe=subjects.node_may_subscribe(node),
            expires=time.time() + ttl,
        )

    def local_key(self, node: str) -> KeyPair:
        """The key of a node of this very machine: always the same, since a node's name belongs to one key."""
        secret = self._signing.seed.encode()
        return KeyPair.of_user(hashlib.blake2b(node.encode(), key=secret, person=b"springtide-node").digest()[:32])

    def local_node(self, node: str, urls: list[str], *, ttl: float = 3600) -> Credentials:
        """Whole credentials for a node of this very machine, which needs no join token."""
        key = self.local_key(node)
        return Credentials(
            name=node,
            urls=urls,
            jwt=self.node_credentials(node, key.public, ttl=ttl),
            seed=key.seed,
            ca_pem=self.ca_pem if wants_tls(urls) else "",
            inbox_prefix=subjects.node_inbox(node),
        )

    def join_token(self, urls: list[str], *, ttl: float = 3600) -> str:
        """A token that lets one machine become a node, once, within `ttl` seconds. It pins our CA."""
        wants_tls(urls)
        token_id, key = secrets.token_hex(8), KeyPair.new_user()
        jwt = nats_jwt.user_jwt(
            self._signing,
            self.account,
            key.public,
            f"join.{token_id}",
            publish=[subjects.join_subject(token_id)],
            subscribe=[f"{subjects.join_inbox(token_id)}.>"],
            expires=time.time() + ttl,
        )
        return JoinToken(id=token_id, urls=urls, jwt=jwt, seed=key.seed, ca_pem=self.ca_pem).encode()

    def _credentials(self, signer: KeyPair, account: str, name: str, urls: list[str]) -> Credentials:
        key = KeyPair.new_user()
        return Credentials(
            name=name,
            urls=urls,
            jwt=nats_jwt.user_jwt(signer, account, key.public, f"platform.{name}"),
            seed=key.seed,
            ca_pem=self.ca_pem if wants_tls(urls) else "",
            inbox_prefix=subjects.platform_inbox(name),
        )
