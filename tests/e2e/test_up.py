"""`springtide up` and its end: what a newcomer does, and what can go wrong on his machine."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from springtide.fabric.certificates import new_ca, new_server_certificate
from tests.e2e.conftest import SPRINGTIDE, Platform, events, free_port, mock_flags, processes_of, wait_until

pytestmark = pytest.mark.e2e
Start = Callable[..., Platform]


def gone(platform: Platform) -> bool:
    """No process of it is left and its ports are free."""
    if processes_of(platform.data_dir):
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", platform.port))
        except OSError:
            return False
    return True


def test_it_says_where_it_is_and_the_curl_line_works_as_printed(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    said = one.said()
    assert f"{one.url}/v1" in said and one.key in said
    curl = said[said.index("  curl ") : said.index("Ctrl-C")].strip()
    answer = subprocess.run(["bash", "-c", curl + " -s"], capture_output=True, text=True, timeout=60)
    assert answer.stdout.startswith("data: {"), answer
    assert answer.stdout.rstrip().endswith("data: [DONE]")


def test_the_key_is_its_owners_alone_and_stays_the_same(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    key, path = one.key, one.data_dir / "api_key"
    assert key.startswith("sk-") and stat.S_IMODE(path.stat().st_mode) == 0o600
    one.stop()
    again = platform(*mock_flags()).ready()
    assert again.key == key and key in again.said()


def test_it_serves_https_with_certificate_files(platform: Start, tmp_path: Path) -> None:
    ca, ca_key = new_ca()
    files = {"ca.pem": ca}
    files["cert.pem"], files["key.pem"] = new_server_certificate(ca, ca_key, ["127.0.0.1"])
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    one = platform(
        *mock_flags(), "--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")
    ).ready()
    url = one.url.replace("http://", "https://")
    assert f"{url}/v1" in one.said() and "curl -k" in one.said()
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    assert httpx.get(f"{url}/ready", verify=trusted, trust_env=False).status_code == 200


def test_ctrl_c_ends_everything_within_five_seconds(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    with one.client() as client, client.stream("POST", "/v1/completions", json=slow("mock")) as response:
        next(events(response))  # a stream is running
        asked = time.monotonic()
        one.process.send_signal(signal.SIGINT)
        assert one.process.wait(10) == 0
        assert time.monotonic() - asked < 5
    wait_until(lambda: gone(one), "no process and no port is left", 2)


def test_sigkill_of_the_parent_leaves_nothing(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    assert len(processes_of(one.data_dir)) >= 5  # up, NATS, gateway, agent, replica
    one.process.kill()
    wait_until(lambda: gone(one), "the children notice and leave", 15)


def test_detach_status_and_down(tmp_path: Path) -> None:
    data, port = tmp_path / "data", str(free_port())
    up = run("up", "--detach", "--port", port, *mock_flags(), "--data-dir", str(data))
    assert up.returncode == 0, up.stderr
    try:
        assert f":{port}/v1" in up.stdout
        key = (data / "api_key").read_text().strip()
        assert key in up.stdout and not any(key in log.read_text() for log in (data / "logs").iterdir())
        assert httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200
        again = run("up", "--detach", "--port", str(free_port()), *mock_flags(), "--data-dir", str(data))
        assert again.returncode == 1 and "runs on" in again.stderr
    finally:
        down = run("down", "--data-dir", str(data))
    assert down.returncode == 0, down.stderr
    wait_until(lambda: not processes_of(data), "nothing is left", 5)
    late = run("status", "--data-dir", str(data))
    assert late.returncode == 1 and "springtide up" in late.stderr


def test_status_has_the_promised_shape(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    status = one.status()
    assert [sorted(g) for g in status["gateways"]] == [["id", "region", "url"]]
    assert [sorted(n) for n in status["nodes"]] == [["devices", "id", "region", "rtt_ms", "site", "state"]]
    assert {"id", "model", "node", "engine", "state", "load"} <= set(status["replicas"][0])
    assert status["replicas"][0]["state"] == "ready"
    assert [d["name"] for d in status["deployments"]] == ["mock"]


@pytest.mark.parametrize(
    ("trouble", "says"),
    [("port", "can't be used"), ("data", "can't be written"), ("nats", "nats-server"), ("model", "broken.gguf")],
)
def test_trouble_is_one_sentence_with_its_remedy(tmp_path: Path, trouble: str, says: str) -> None:
    data, port, env = tmp_path / "data", free_port(), dict(os.environ)
    flags = mock_flags()
    with socket.socket() as taken:
        if trouble == "port":
            taken.bind(("127.0.0.1", port))
            taken.listen()
        elif trouble == "data":
            data.write_text("a file stands where the folder should be")
        elif trouble == "nats":
            env["SPRINGTIDE_NATS_SERVER"] = str(tmp_path / "no-such-nats-server")
        else:
            (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
            flags = ["--model", str(tmp_path / "broken.gguf")]
        result = subprocess.run(
            [*SPRINGTIDE, "up", "--port", str(port), "--data-dir", str(data), *flags],
            capture_output=True, text=True, timeout=120, env=env,
        )  # fmt: skip
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert says in errors[0] and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 2 and errors[1].startswith("hint: "), result.stderr
    assert not processes_of(data)


def test_an_unknown_setting_names_the_nearest_known_one(tmp_path: Path) -> None:
    result = subprocess.run(
        [*SPRINGTIDE, "status"], capture_output=True, text=True, env={**os.environ, "SPRINGTIDE_PROT": "1"}
    )
    assert result.returncode == 1 and "SPRINGTIDE_PORT" in result.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SPRINGTIDE, *arguments], capture_output=True, text=True, timeout=120)


def slow(model: str) -> dict[str, object]:
    return {"model": model, "prompt": "hello", "max_tokens": 3000, "ignore_eos": True, "stream": True}
