"""The server as a child: it starts, comes back as it was, ends with us, and says what is wrong."""

from __future__ import annotations

import os
import platform
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from springtide.core.errors import SetupError
from springtide.fabric import certificates
from springtide.fabric import server as server_module
from springtide.fabric.authority import Authority
from springtide.fabric.server import NatsServer, find_nats_server, reach_beyond, urls_for_nodes
from tests.fabric.conftest import World


def test_a_server_keeps_its_port_over_restarts(nats: World) -> None:
    port = nats.server.port
    assert port > 0
    nats.server.stop()
    assert not nats.server.alive()

    again = NatsServer(nats.directory / "nats", nats.authority)
    again.start()
    try:
        assert again.port == port
        assert again.url == f"nats://127.0.0.1:{port}"
        assert again.node_url("fabric.example.org") == f"tls://fabric.example.org:{port}"
        assert again.node_url() == f"tls://127.0.0.1:{port}"
    finally:
        again.stop()


def test_a_server_that_died_is_started_again_by_its_owner(nats: World) -> None:
    port = nats.server.port
    os.kill(nats.server.pid, signal.SIGKILL)
    while nats.server.alive():
        time.sleep(0.01)
    nats.server.start()
    assert nats.server.alive() and nats.server.port == port


def test_only_loopback_is_spoken_to_plainly(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    for host, url in (
        ("0.0.0.0", "nats://127.0.0.1:5"),
        ("127.0.0.2", "nats://127.0.0.2:5"),
        ("10.0.0.9", "tls://10.0.0.9:5"),
        ("::", "nats://127.0.0.1:5"),
        ("fd00::9", "tls://[fd00::9]:5"),
    ):
        assert NatsServer(tmp_path, authority, host=host, port=5).url == url


@pytest.mark.parametrize("address", ["0.0.0.0", "::", ""])
def test_other_machines_are_told_a_name_that_the_certificate_holds(tmp_path: Path, address: str) -> None:
    if not server_module._is_free(address, 0):
        pytest.skip("this machine has no IPv6")
    authority = Authority.open(tmp_path / "authority")
    server = NatsServer(tmp_path / "nats", authority, host=address)
    server.start()
    try:
        (url,) = urls_for_nodes([server.url], address)
        assert url == f"tls://{platform.node()}:{server.port}" and reach_beyond([url])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=authority.ca_pem)
        with (  # dialled by address: here the name may resolve to nothing
            socket.create_connection(("127.0.0.1", server.port)) as plain,
            context.wrap_socket(plain, server_hostname=platform.node()) as secure,
        ):
            assert secure.recv(5) == b"INFO "
    finally:
        server.stop()


def test_other_urls_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = ["nats://127.0.0.1:5"], ["tls://fabric.example.org:5"]
    assert urls_for_nodes(here, "127.0.0.1") == here and not reach_beyond(here)
    assert urls_for_nodes(there, "127.0.0.1") == there and reach_beyond(there)
    assert urls_for_nodes(there, "0.0.0.0") == there  # a server of somebody else
    monkeypatch.setattr(platform, "node", lambda: "localhost")  # which is no name for others
    assert "localhost" not in str(urls_for_nodes(here, "0.0.0.0")) or not certificates._outward_address()


def test_a_port_in_use_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_PORT_PATIENCE_S", 0.1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = NatsServer(tmp_path / "nats", Authority.open(tmp_path / "authority"), port=port)
        with pytest.raises(SetupError, match=rf"port {port} .* in use .*fabric_port"):
            server.start()
    assert not server.alive()


def test_two_servers_can_not_share_a_directory(nats: World) -> None:
    with pytest.raises(SetupError, match="another process runs a NATS server"):
        NatsServer(nats.directory / "nats", nats.authority).start()
    assert nats.server.alive()


def test_a_missing_or_broken_binary_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="not an executable file"):
        find_nats_server(str(tmp_path / "nats-server"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    server = NatsServer(tmp_path / "nats", Authority.open(tmp_path / "authority"), binary=str(broken))
    with pytest.raises(SetupError, match="can't be run"):
        server.start()


def test_an_old_binary_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho nats-server: v2.9.1\n")
    old.chmod(0o755)
    server = NatsServer(tmp_path / "nats", Authority.open(tmp_path / "authority"), binary=str(old))
    with pytest.raises(SetupError, match=r"too old .*2\.11"):
        server.start()


def test_a_server_that_does_not_start_shows_its_last_words(tmp_path: Path) -> None:
    liar = tmp_path / "liar"
    words = "[ $1 = --version ] && echo nats-server: v2.99.0 && exit\necho no disk left >&2; exit 1\n"
    liar.write_text(f"#!/bin/sh\n{words}")
    liar.chmod(0o755)
    server = NatsServer(tmp_path / "nats", Authority.open(tmp_path / "authority"), binary=str(liar))
    with pytest.raises(SetupError, match=r"ended while starting: .*no disk left"):
        server.start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a child ask to die with its parent")
def test_the_server_dies_with_a_killed_parent_and_not_by_ctrl_c(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from springtide.fabric.authority import Authority; from springtide.fabric.server import NatsServer\n"
        "server = NatsServer(Path(sys.argv[1]), Authority.open(Path(sys.argv[1])))\n"
        "server.start(); print(server.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert os.getsid(pid) == pid  # a session of its own: the terminal's Ctrl-C does not reach it
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that is dead and only not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_secrets_are_for_their_owner_alone(nats: World) -> None:
    credentials = nats.authority.platform_credentials("gateway", [nats.server.url])
    credentials.save(nats.directory / "gateway.creds")
    for path in nats.directory.rglob("*"):
        if path.suffix in (".json", ".key", ".creds", ".conf"):
            assert path.stat().st_mode & 0o077 == 0, path


def test_an_authority_is_the_same_after_reopening(tmp_path: Path) -> None:
    first, second = Authority.open(tmp_path), Authority.open(tmp_path)
    assert (first.account, first.ca_pem) == (second.account, second.ca_pem)
    assert first.server_certificate(["localhost"]) == second.server_certificate(["localhost"])
    (tmp_path / "authority.json").write_text("{")
    with pytest.raises(SetupError, match="can't read the fabric's keys"):
        Authority.open(tmp_path)


def test_a_server_certificate_is_made_anew_only_for_new_names(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    certificate, _ = authority.server_certificate(["localhost", "127.0.0.1"])
    before = certificate.read_text()
    authority.server_certificate(["localhost"])
    assert certificate.read_text() == before
    authority.server_certificate(["localhost", "fabric.example.org"])
    assert certificate.read_text() != before
