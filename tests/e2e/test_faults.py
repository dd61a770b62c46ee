"""What dies comes back, and streams and records survive what they can. Real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import SPRINGTIDE, Platform, events, mock_flags, processes_of, wait_until

pytestmark = pytest.mark.e2e
Start = Callable[..., Platform]


def body(tokens: int, *, stream: bool = True, seed: int = 7) -> dict[str, object]:
    return {
        "model": "mock", "prompt": "tell me", "max_tokens": tokens, "ignore_eos": True, "seed": seed, "stream": stream
    }  # fmt: skip


def text_of(client: httpx.Client, tokens: int, during: Callable[[int], None] | None = None) -> str:
    """The text of one stream; `during(n)` is called after the n-th chunk."""
    text = ""
    with client.stream("POST", "/v1/completions", json=body(tokens)) as response:
        assert response.status_code == 200, response.read()
        for number, event in enumerate(events(response)):
            if event == "[DONE]":
                return text
            assert isinstance(event, dict) and "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            if during is not None:
                during(number)
    raise AssertionError(f"the stream ended without [DONE] after {text[-80:]!r}")


def test_a_killed_replica_is_back_by_itself(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    (pid,) = one.pids("replica_main")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: one.pids("replica_main") not in ([], [pid]), "a new process", 30)
    with one.client() as client:  # waits in the gateway until the replica is ready
        assert client.post("/v1/completions", json=body(5, stream=False)).status_code == 200


def test_a_killed_gateway_and_a_killed_agent_are_back_too(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    for word in (" gateway ", " agent "):
        (pid,) = one.pids(word)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda word=word, pid=pid: one.pids(word) not in ([], [pid]), f"a new{word}process", 30)

    def served() -> bool:
        try:
            with one.client() as client:
                return client.post("/v1/completions", json=body(5, stream=False)).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(served, "requests are served again", 60)


def test_a_stream_goes_on_through_a_restart_of_nats(platform: Start) -> None:
    one = platform(*mock_flags(step_ms=20)).ready()

    def kill(number: int) -> None:
        if number == 30:
            (pid,) = one.pids("nats-server")
            os.kill(pid, signal.SIGKILL)

    with one.client() as client:
        expected = text_of(client, 300)
        assert text_of(client, 300, kill) == expected
    assert "fabric ended; starting it again" in one.said()


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_stream_goes_on_when_its_replica_is_killed(platform: Start, replicas: int) -> None:
    """At another one that is there, or at the same when it is back."""
    one = platform(*mock_flags(replicas=replicas, step_ms=20)).ready()
    wait_until(lambda: sum(r["state"] == "ready" for r in one.status()["replicas"]) == replicas, "the replicas")

    def kill(number: int) -> None:
        if number in (30, 90):  # of two, one of them runs it
            pids = sorted(one.pids("replica_main"))
            os.kill(pids[0] if number == 30 else pids[-1], signal.SIGKILL)

    with one.client() as client:
        expected = text_of(client, 200)
        assert text_of(client, 200, kill) == expected


def test_a_request_that_had_sent_nothing_is_tried_again(platform: Start) -> None:
    one = platform(*mock_flags(replicas=2, step_ms=3000)).ready()
    wait_until(lambda: sum(r["state"] == "ready" for r in one.status()["replicas"]) == 2, "two replicas")
    with one.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/completions", json=body(2, stream=False))
        time.sleep(1)  # the first token is 3 s away
        for pid in one.pids("replica_main"):
            os.kill(pid, signal.SIGKILL)
        choice = answer.result(60).json()["choices"][0]
    assert len(choice["text"].split()) == 2

    def recorded() -> list[dict[str, Any]]:
        return json.loads(one.run("usage", "--json", "--by", "request"))["rows"]

    (usage,) = wait_until(recorded, "the usage record", 10)
    assert [attempt["outcome"] for attempt in usage["attempts"]] == ["failed", "finished"]
    assert [attempt["number"] for attempt in usage["attempts"]] == [1, 2]


def test_a_whole_answer_that_was_half_done_starts_over_and_is_the_same(platform: Start) -> None:
    one = platform(*mock_flags(replicas=2, step_ms=20)).ready()
    wait_until(lambda: sum(r["state"] == "ready" for r in one.status()["replicas"]) == 2, "two replicas")
    with one.client() as client, ThreadPoolExecutor(1) as pool:
        expected = text_of(client, 150)
        answer = pool.submit(client.post, "/v1/completions", json=body(150, stream=False))
        wait_until(lambda: one.metric("springtide_replica_running") == 1, "it runs", 10)
        time.sleep(1)  # a third of the answer
        for pid in one.pids("replica_main"):
            os.kill(pid, signal.SIGKILL)
        assert answer.result(60).json()["choices"][0]["text"] == expected
    assert one.metric("springtide_attempts_lost_total") >= 1


def test_each_request_is_recorded_once_though_gateway_and_nats_are_killed(platform: Start) -> None:
    one = platform(*mock_flags(step_ms=1)).ready()
    done = 0
    for round_ in range(3):
        with one.client() as client:
            for _ in range(10):
                assert client.post("/v1/completions", json=body(3, stream=False)).status_code == 200
                done += 1
        victim = one.pids(" gateway ") if round_ != 1 else one.pids("nats-server")
        os.kill(victim[0], signal.SIGKILL)
        wait_until(lambda: ready(one), "ready again", 60)

    def counted() -> bool:
        rows = json.loads(one.run("usage", "--json", check=False) or '{"rows": []}')["rows"]
        return sum(row["requests"] for row in rows) == done

    wait_until(counted, f"{done} records", 30)
    rows = json.loads(one.run("usage", "--json"))["rows"]
    assert sum(row["completion_tokens"] for row in rows) == 3 * done


def ready(one: Platform) -> bool:
    try:
        return httpx.get(f"{one.url}/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_second_machine_joins_with_a_token_once_and_serves(platform: Start, tmp_path: Path) -> None:
    one = platform(*mock_flags(replicas=1)).ready()
    token = json.loads(one.run("node", "token", "--json"))
    second = tmp_path / "second"
    url = token["url"].replace("nats://", "tls://")  # as from another machine: encrypted, the authority pinned
    command = [*SPRINGTIDE, "node", "join", url, "--token", token["token"], "--name", "beta"]
    log = open(tmp_path / "second.log", "wb")  # noqa: SIM115
    joined = subprocess.Popen([*command, "--data-dir", str(second)], stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: {n["id"] for n in one.status()["nodes"]} == {"local", "beta"}, "two nodes", 30)
        one.run("scale", "mock", "2")

        def spread() -> bool:
            return {r["node"] for r in one.status()["replicas"] if r["state"] == "ready"} == {"local", "beta"}

        wait_until(spread, "a replica on each node", 30)
        third = subprocess.run(
            [*command, "--data-dir", str(tmp_path / "third")], capture_output=True, text=True, timeout=60
        )
        assert third.returncode == 1 and "token" in third.stderr
        one.run("node", "drain", "local")
        wait_until(
            lambda: {r["node"] for r in one.status()["replicas"] if r["state"] == "ready"} == {"beta"}, "drained", 40
        )
        with one.client() as client:
            assert client.post("/v1/completions", json=body(5, stream=False)).status_code == 200
    finally:
        joined.send_signal(signal.SIGINT)
        joined.wait(30)
        log.close()
    assert not processes_of(second)


def test_keys_can_be_made_and_revoked_while_it_runs(platform: Start) -> None:
    one = platform(*mock_flags()).ready()
    made = json.loads(one.run("keys", "create", "for-a-test", "--tenant", "acme", "--json"))

    def code() -> int:
        headers = {"authorization": f"Bearer {made['key']}"}
        return httpx.get(f"{one.url}/v1/models", headers=headers, trust_env=False).status_code

    wait_until(lambda: code() == 200, "the new key is known", 10)
    one.run("keys", "revoke", made["id"])
    wait_until(lambda: code() == 401, "the revoked key is refused", 10)
    assert made["key"] not in one.run("keys", "list", "--json")
