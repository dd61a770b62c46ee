"""What a platform does for its machine while it is up, without its processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from springtide.cli import up
from springtide.core.config import Settings
from springtide.core.errors import SpringtideError
from springtide.core.store import ModelStore
from springtide.fabric.authority import Authority
from springtide.fabric.credentials import Credentials

URL = "nats://127.0.0.1:4222"


@pytest.fixture
def platform(tmp_path: Path) -> up.Platform:
    """One whose node's credentials ended while the machine slept."""
    platform = up.Platform(Settings(data_dir=str(tmp_path)), {})
    platform._state.fabric_url = URL
    authority = Authority.open(tmp_path / "fabric")
    authority.local_node(up.LOCAL_NODE, [URL], ttl=-5).save(platform._node_credentials)
    return platform


def test_the_local_nodes_credentials_are_renewed_after_a_sleep(platform: up.Platform) -> None:
    ended = Credentials.load(platform._node_credentials)
    platform._sign_again_local_node()
    renewed = Credentials.load(platform._node_credentials)
    assert renewed.expires is not None and renewed.expires > time.time() + up.SIGN_EVERY_S
    assert renewed.seed == ended.seed
    assert time.time() < platform._sign_again < renewed.expires


def test_a_disk_that_takes_nothing_does_not_end_the_platform(
    platform: up.Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Credentials, path: Path) -> None:
        raise up.SetupError("can't write", hint="is the disk full?")

    monkeypatch.setattr(Credentials, "save", refuse)
    platform._sign_again_local_node()
    assert "can't write" in capsys.readouterr().err
    assert platform._sign_again > time.time()


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts back what handles signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_ctrl_c_ends_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "setup_logging", lambda *_: None)
    monkeypatch.setattr(ModelStore, "resolve", lambda *_, **__: time.sleep(60))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(SpringtideError, match="interrupted"):
        up.Platform(Settings(data_dir=str(tmp_path), port=port), {}).run()
    assert time.monotonic() - began < 5
    assert not (tmp_path / "run.json").exists()
