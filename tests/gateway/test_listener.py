"""Ports and certificates: what is not right says so in one sentence."""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from springtide.core.errors import SetupError
from springtide.gateway.http import Receive, Scope, Send
from springtide.gateway.limits import Limits
from springtide.gateway.listener import Certificate, Listener
from tests.gateway.conftest import Cloud

LIMITS = Limits(header_timeout=2.0)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def pem(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


async def test_a_free_port_is_found_and_given_back() -> None:
    listener = Listener(hello, "127.0.0.1", 0, limits=LIMITS)
    await listener.start()
    port = listener.port
    async with httpx.AsyncClient() as client:
        assert (await client.get(listener.url)).text == "hello"
    listener.close()
    await listener.wait_closed(5)
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_a_port_in_use_is_named_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=f"{port}.*--port"):
            await Listener(hello, "127.0.0.1", port, limits=LIMITS).start()


async def test_a_second_listener_does_not_share_the_port_of_the_first() -> None:
    first = Listener(hello, "127.0.0.1", 0, limits=LIMITS)
    await first.start()
    with pytest.raises(SetupError, match="in use"):
        await Listener(hello, "127.0.0.1", first.port, limits=LIMITS).start()
    first.close()
    await first.wait_closed(5)


async def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(SetupError, match=r"192\.0\.2\.1"):
        await Listener(hello, "192.0.2.1", 0, limits=LIMITS).start()


async def test_tls(cloud: Cloud, pem: tuple[Path, Path]) -> None:
    cert, key = pem
    async with cloud.gateway(tls_cert=str(cert), tls_key=str(key)) as url:
        assert url.startswith("https://")
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(cert))) as client:
            answer = await client.get(f"https://localhost:{url.rpartition(':')[2]}/health")
    assert answer.json() == {"status": "ok"}


async def test_certificate_files_that_are_not_right(pem: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = pem
    Certificate(cert, key)
    with pytest.raises(SetupError, match="can't be used"):
        Certificate(cert, tmp_path / "missing.pem")
    with pytest.raises(SetupError, match="can't be used"):
        Certificate(key, cert)


async def test_half_of_a_certificate_stops_the_start(cloud: Cloud, pem: tuple[Path, Path]) -> None:
    with pytest.raises(SetupError, match="both"):
        async with cloud.gateway(tls_cert=str(pem[0])):
            pass


async def test_the_operators_url_is_there_while_the_gateway_runs(cloud: Cloud) -> None:
    file = cloud.directory / "admin.url"
    async with cloud.gateway():
        assert file.read_text().startswith("http://127.0.0.1:")
    assert not file.exists()
