"""The fabric's own certificate authority and its servers' certificates. Knows PEM, not files or sockets."""

from __future__ import annotations

import datetime
import ipaddress
import platform
import socket
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_LIFE = datetime.timedelta(days=3650)
_SERVER_LIFE = datetime.timedelta(days=365)
_RENEW_BEFORE = datetime.timedelta(days=30)
_USES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]  # servers also dial each other
_CLOCK_SKEW = datetime.timedelta(minutes=5)


def new_ca() -> tuple[str, str]:
    """A certificate authority as (certificate, private key), both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Springtide fabric CA")
    certificate = (
        _builder(name, name, key.public_key(), _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


def new_server_certificate(ca_pem: str, ca_key_pem: str, hosts: Iterable[str]) -> tuple[str, str]:
    """A server certificate for `hosts` (names and addresses) as (certificate, private key), both PEM."""
    ca = x509.load_pem_x509_certificate(ca_pem.encode())
    ca_key = serialization.load_pem_private_key(ca_key_pem.encode(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("Springtide fabric"), ca.subject, key.public_key(), _SERVER_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USES), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


def still_good(certificate_pem: str, hosts: Iterable[str]) -> bool:
    """Whether a server certificate names all `hosts`, serves all uses, and does not end within a month."""
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    if set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) != set(_USES):
        return False
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if not {_general_name(host) for host in hosts} <= set(names):
        return False
    return certificate.not_valid_after_utc > datetime.datetime.now(datetime.UTC) + _RENEW_BEFORE


def local_hosts(extra: Iterable[str] = ()) -> list[str]:
    """What this machine may be called by those who dial it."""
    hosts = ["localhost", "127.0.0.1", own_name(), socket.gethostname(), _outward_address(), *extra]
    return sorted({host for host in hosts if host and host not in ("0.0.0.0", "::")})


def own_name() -> str:
    """What other machines call this one, unless they were told better: its host name."""
    name = platform.node()
    return name if name not in ("", "localhost") else _outward_address() or "localhost"


def _outward_address() -> str:
    """This machine's address on its default route; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + life)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
