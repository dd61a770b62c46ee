"""What single commands send to the admin API, and what they print of its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from springtide.cli.client import AdminClient
from springtide.cli.daily import Privacy
from springtide.cli.main import app
from springtide.core.cluster import PrivacyClass


class StubAdmin:
    """Notes what is sent; answers what it was told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.answer: dict[str, Any] = {}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        self.calls.append((method, path, body))
        return self.answer


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> StubAdmin:
    stub = StubAdmin()
    monkeypatch.setattr(AdminClient, "of", lambda data_dir: stub)
    return stub


def run(tmp_path: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--data-dir", str(tmp_path)])


def test_a_token_that_only_this_machine_can_use_says_so_beside_it(admin: StubAdmin, tmp_path: Path) -> None:
    admin.answer = {"token": "stj1-x", "url": "nats://127.0.0.1:5", "expires": "soon", "note": "only this machine"}
    result = run(tmp_path, "node", "token")
    assert result.stdout == "stj1-x\n"
    assert "note: only this machine" in result.stderr and "--fabric-host ADDRESS" in result.stderr
    result = run(tmp_path, "node", "token", "--json")
    assert json.loads(result.stdout) == admin.answer
    assert "--fabric-host ADDRESS" in result.stderr


def test_a_token_for_others_needs_no_word(admin: StubAdmin, tmp_path: Path) -> None:
    admin.answer = {"token": "stj1-x", "url": "tls://host:5", "expires": "soon"}
    result = run(tmp_path, "node", "token")
    assert (result.stdout, result.stderr) == ("stj1-x\n", "")


@pytest.mark.parametrize("privacy", get_args(PrivacyClass))
def test_a_keys_tenant_can_be_given_a_privacy_class(admin: StubAdmin, tmp_path: Path, privacy: str) -> None:
    admin.answer = {"key": "sk-1"}
    result = run(tmp_path, "keys", "create", "laptop", "--tenant", "acme", "--privacy", privacy)
    assert result.stdout == "sk-1\n"
    assert admin.calls == [("POST", "/keys", {"name": "laptop", "tenant": "acme", "privacy": privacy})]


def test_a_tenant_keeps_what_the_command_does_not_name(admin: StubAdmin, tmp_path: Path) -> None:
    admin.answer = {"key": "sk-1"}
    run(tmp_path, "keys", "create")
    run(tmp_path, "keys", "create", "--weight", "2")
    assert [body for _, _, body in admin.calls] == [
        {"name": "", "tenant": "default"},
        {"name": "", "tenant": "default", "weight": 2.0},
    ]


def test_an_unknown_privacy_class_is_refused_with_the_known_ones(admin: StubAdmin, tmp_path: Path) -> None:
    result = run(tmp_path, "keys", "create", "--privacy", "secret")
    assert result.exit_code == 2 and admin.calls == []
    for word in ("privacy", "secret", "trusted", "any"):
        assert word in result.stderr


def test_the_privacy_classes_are_those_of_the_platform() -> None:
    assert tuple(member.value for member in Privacy) == get_args(PrivacyClass)


def test_what_happened_to_a_request_is_told_in_order(admin: StubAdmin, tmp_path: Path) -> None:
    here = {"gateway": "g1", "node": "n1", "replica": "r1", "attempt": 1, "why": ""}
    attempt = {"number": 1, "node": "n1", "replica": "r1", "started": 10.0, "ended": 12.5, "outcome": "finished"}
    tokens = {"prompt_tokens": 7, "completion_tokens": 5, "cached_tokens": 0}
    admin.answer = {
        "request_id": "chatcmpl-1",
        "events": [
            {**here, "at": 10.0, "what": "admitted", "attempt": 0, "node": "", "replica": ""},
            {**here, "at": 10.25, "what": "routed", "why": "least loaded of 2"},
        ],
        "left_out": 3,
        "silent_gateways": ["g2"],
        "usage": {
            "request_id": "chatcmpl-1",
            "model": "m",
            "outcome": "finished",
            "attempts": [{**attempt, **tokens}],
            **tokens,
        },
    }
    answer = run(tmp_path, "explain", "chatcmpl-1")
    assert answer.exit_code == 0, answer.output
    assert admin.calls == [("GET", "/requests/chatcmpl-1/explain", None)]
    for words in ("admitted", "0.250", "r1 on n1", "least loaded of 2", "3 events", "gateway g2 did not say", "2.50"):
        assert words in answer.output
    assert json.loads(run(tmp_path, "explain", "chatcmpl-1", "--json").output) == admin.answer
