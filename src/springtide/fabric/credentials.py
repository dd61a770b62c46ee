"""What a process needs to speak on the fabric, as one file. Knows nothing of how it was issued."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from springtide.core.errors import SetupError
from springtide.fabric import nats_jwt
from springtide.fabric.files import write_private


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """A user's signed token and its secret half. `urls` are `tls://host:port`, or `nats://` on loopback only;
    `ca_pem` is the one authority that a TLS server is checked against. `inbox_prefix` is where answers go."""

    name: str
    urls: list[str]
    jwt: str
    seed: str
    ca_pem: str = ""
    inbox_prefix: str

    def save(self, path: Path) -> None:
        """Write to `path`, mode 0600, whole or not at all."""
        write_private(path, msgspec.json.format(msgspec.json.encode(self)))

    @classmethod
    def load(cls, path: Path) -> Credentials:
        """
        Raises:
            SetupError: the file is missing, not readable, or no credentials.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise SetupError(
                f"can't read the credentials {path}: {error.strerror}", hint="has this node joined?"
            ) from None
        except msgspec.MsgspecError as error:
            raise SetupError(f"{path} holds no credentials: {error}", hint="join anew") from None

    @property
    def expires(self) -> float | None:
        """Unix seconds; None: never."""
        return nats_jwt.expiry(self.jwt)

    @property
    def tls(self) -> bool:
        """Whether the wire is encrypted.

        Raises:
            SetupError: plain NATS to another machine, a mixture, or no URL at all.
        """
        return wants_tls(self.urls)


def urls_of(setting: str) -> list[str]:
    """One URL, or all those of a cluster's servers with commas between them."""
    return [url.strip() for url in setting.split(",") if url.strip()]


def wants_tls(urls: list[str]) -> bool:
    """Whether these servers are spoken to by TLS; plain only ever to this machine itself.

    Raises:
        SetupError: plain NATS to another machine, a mixture, or no URL at all.
    """
    schemes = {urlsplit(url).scheme for url in urls}
    if schemes == {"tls"}:
        return True
    if schemes != {"nats"}:
        raise SetupError(f"fabric URLs must be all tls:// or all nats://, not {urls}")
    for url in urls:
        if not is_loopback(urlsplit(url).hostname or ""):
            raise SetupError(f"{url} would send credentials unencrypted", hint="use tls:// to other machines")
    return False


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
