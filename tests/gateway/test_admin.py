"""The operator's API over real HTTP, with a real fabric and a real ledger beneath."""

from __future__ import annotations

import asyncio
import platform
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from springtide.core.cluster import Deployment, Device, Gateway, KeyRecord, Node, Replica
from springtide.core.engine_api import EngineLoad
from springtide.core.errors import Unauthorized
from springtide.fabric import subjects
from springtide.fabric.desired import NodeIntent, Registry
from springtide.fabric.join_token import JoinToken
from springtide.fabric.presence import Heart, PresenceView
from springtide.gateway.admin import MAX_BODY, AdminApi, ensure_admin_token
from springtide.gateway.explain import Explainer
from springtide.gateway.keys import KeyView
from springtide.gateway.listener import Listener
from springtide.gateway.trace import TraceBook
from springtide.ledger.store import Ledger
from tests.gateway.conftest import LIMITS, Cloud, until
from tests.ledger.records import NOON, usage

NODE = Node(id="n1", region="eu", site="home", devices=[Device(kind="cpu", name="Xeon", memory=2**34, cores=2)])
REPLICA = Replica(
    id="r1", node="n1", model="m", engine="mock", state="failed", error="no file", load=EngineLoad(steps=3)
)
GATEWAY = Gateway(id="g1", url="http://127.0.0.1:8000", region="eu")


class Admin:
    """A listening admin API and a client that has its token."""

    def __init__(self, cloud: Cloud, listener: Listener, token: str) -> None:
        self.cloud = cloud
        self.port = listener.port
        self.client = httpx.AsyncClient(
            base_url=listener.url, headers={"authorization": f"Bearer {token}"}, timeout=30, trust_env=False
        )

    async def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The JSON answer; of an error its message."""
        response = await self.client.request(method, path, json=body)
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        return answer if status == 200 else answer["error"]["message"]


async def serve(
    cloud: Cloud, ledger: Ledger | None, *, signs: bool = True, fabric_url: str = ""
) -> AsyncIterator[Admin]:
    fabric = cloud.platform
    presence = PresenceView(fabric)
    await presence.start()
    token = ensure_admin_token(cloud.directory)
    explainer = Explainer(fabric, "gateway-here", presence, TraceBook())
    api = AdminApi(
        ledger,
        presence,
        Registry(fabric, subjects.DEPLOYMENTS, Deployment),
        Registry(fabric, subjects.INTENTS, NodeIntent),
        cloud.authority if signs else None,
        fabric,
        [fabric_url or cloud.nats.url],
        token,
        explainer=explainer,
    )
    listener = Listener(api, "127.0.0.1", 0, limits=LIMITS)
    await listener.start()
    admin = Admin(cloud, listener, token)
    async with admin.client:
        yield admin
    listener.close()
    await listener.wait_closed(1.0)
    await presence.stop()


@pytest.fixture
async def admin(cloud: Cloud) -> AsyncIterator[Admin]:
    async for admin in serve(cloud, cloud.ledger):
        yield admin


@pytest.fixture
async def bare_admin(cloud: Cloud) -> AsyncIterator[Admin]:
    """That of a process without ledger or authority."""
    async for admin in serve(cloud, None, signs=False):
        yield admin


@pytest.fixture
async def fleet(cloud: Cloud) -> AsyncIterator[None]:
    hearts = [Heart(cloud.platform, lambda record=record: record) for record in (NODE, REPLICA, GATEWAY)]  # type: ignore[misc]
    for heart in hearts:
        await heart.start()
    yield
    for heart in hearts:
        await heart.stop()


async def test_status_says_what_runs_and_nothing_else(admin: Admin, fleet: None) -> None:
    await admin("PUT", "/deployments", {"name": "m", "source": "mock", "engine": "mock"})

    async def complete() -> Any:
        status = await admin("GET", "/status")
        return status if status["replicas"] and status["gateways"] and status["nodes"] else None

    device = {"kind": "cpu", "name": "Xeon", "memory": 2**34, "cores": 2}
    load = {"running": 0, "waiting": 0, "blocks_free": 0, "blocks_total": 0, "steps": 3, "preemptions": 0}
    assert await until(complete, "all have been heard of") == {
        "gateways": [{"id": "g1", "url": "http://127.0.0.1:8000", "region": "eu"}],
        "nodes": [{"id": "n1", "region": "eu", "site": "home", "devices": [device], "state": "ready", "rtt_ms": None}],
        "replicas": [{"id": "r1", "model": "m", "node": "n1", "engine": "mock", "state": "failed", "load": load}],
        "deployments": [{"name": "m", "source": "mock", "engine": "mock", "replicas": 1, "options": {}}],
    }
    (replica,) = await admin("GET", "/replicas")
    assert replica["error"] == "no file"


async def test_deployments_are_put_listed_and_deleted(admin: Admin) -> None:
    assert await admin("GET", "/deployments") == []
    wanted = {"name": "org/model 1.5", "source": "hf:org/model", "replicas": 2, "options": {"dtype": "float32"}}
    assert await admin("PUT", "/deployments", wanted) == {**wanted, "engine": "springtide"}
    await admin("PUT", "/deployments", {**wanted, "replicas": 0})
    (deployment,) = await admin("GET", "/deployments")
    assert deployment["replicas"] == 0
    registry = Registry(admin.cloud.platform, subjects.DEPLOYMENTS, Deployment)
    assert list((await registry.items()).values()) == [Deployment(**deployment)]
    assert "there are org/model 1.5" in await admin("DELETE", "/deployments/other", status=404)
    await admin("DELETE", "/deployments/org/model%201.5")
    assert await admin("GET", "/deployments") == []
    assert "none at all" in await admin("DELETE", "/deployments/other", status=404)


async def test_a_wrong_deployment_is_refused_by_name(admin: Admin) -> None:
    cases: list[tuple[Any, str]] = [
        ({"name": "m"}, "source"),
        ({"name": "m", "source": "mock", "replica": 1}, "unknown field `replica`"),
        ({"name": "m", "source": "mock", "replicas": -1}, "replicas is -1"),
        ({"name": "m", "source": "mock", "replicas": "2"}, "Expected `int`, got `str`"),
        ({"name": "", "source": "mock"}, "1 to 200 printable"),
        ({"name": "m", "source": " "}, "source is empty"),
        ([], "Expected `object`"),
    ]
    for body, message in cases:
        assert message in await admin("PUT", "/deployments", body, status=400)
    assert await admin("GET", "/deployments") == []


async def test_a_key_lives_from_create_to_revoke(admin: Admin) -> None:
    made = await admin("POST", "/keys", {"name": "laptop", "tenant": "acme", "weight": 4.0})
    assert made["key"].startswith("sk-") and made["published"] is True and made["tenant"] == "acme"
    view = KeyView(Registry(admin.cloud.platform, subjects.KEYS, KeyRecord))
    await view.start()
    assert view.lookup(f"Bearer {made['key']}").tenant.weight == 4.0
    (listed,) = await admin("GET", "/keys")
    assert made["key"] not in str(listed) and listed["id"] == made["id"] and listed["revoked"] is None
    assert datetime.fromisoformat(listed["created"]).tzinfo is not None
    revoked = await admin("DELETE", f"/keys/{made['id']}")
    assert revoked["revoked"] is not None and "key" not in revoked

    def refused() -> bool:
        try:
            return view.lookup(f"Bearer {made['key']}") is None
        except Unauthorized:
            return True

    await until(refused, "the gateway refuses it")
    await view.stop()
    assert "no key 'key-0'" in await admin("DELETE", "/keys/key-0", status=404)


async def test_a_key_needs_nothing_but_asking(admin: Admin) -> None:
    made = await admin("POST", "/keys")
    assert (made["tenant"], made["name"]) == ("default", "unnamed")
    assert "weight" in await admin("POST", "/keys", {"weight": 0}, status=400)
    assert "privacy" in await admin("POST", "/keys", {"privacy": "none"}, status=400)
    for limit in ("x", "0", "10001"):
        assert "limit" in await admin("GET", f"/keys?limit={limit}", status=400)


async def test_tenants_are_changed_one_field_at_a_time(admin: Admin) -> None:
    made = await admin("PUT", "/tenants/acme", {"weight": 2})
    changed = await admin("PUT", "/tenants/acme", {"privacy": "any"})
    assert changed == {**made, "privacy": "any"} == {"id": made["id"], "name": "acme", "weight": 2.0, "privacy": "any"}
    assert await admin("GET", "/tenants") == [changed]


async def test_usage_is_summed_and_listed(admin: Admin) -> None:
    made = await admin("POST", "/keys", {"name": "laptop", "tenant": "acme"})
    fields = {"tenant": made["tenant_id"], "key_id": made["id"]}
    await admin.cloud.ledger.record_usage(
        [usage("req-1", **fields), usage("req-2", **fields, created=NOON + 3600), usage("req-3", outcome="failed")]
    )
    by_tenant = await admin("GET", "/usage?by=tenant&tenant=acme")
    sums = {"requests": 2, "finished": 2, "failed": 0, "cancelled": 0}
    sums |= {"prompt_tokens": 20, "completion_tokens": 10, "cached_tokens": 8}
    assert by_tenant == {
        "rows": [{"tenant": made["tenant_id"], "tenant_name": "acme", **sums}],
        "truncated": False,
        "total": sums,
    }
    by_day = await admin("GET", "/usage?by=day,model")
    assert [(row["day"], row["model"], row["requests"]) for row in by_day["rows"]] == [("2026-03-01", "smollm2", 3)]
    assert (await admin("GET", "/usage?by=model&limit=1"))["truncated"] is True
    assert (await admin("GET", "/usage"))["total"]["requests"] == 3

    page = await admin("GET", "/usage?by=request&limit=2")
    assert [row["request_id"] for row in page["rows"]] == ["req-2", "req-3"]
    rest = await admin("GET", f"/usage?by=request&limit=2&before={page['next']}")
    assert [row["request_id"] for row in rest["rows"]] == ["req-1"] and rest["next"] is None
    assert rest["rows"][0]["attempts"][0]["node"] == "node-1"
    assert (await admin("GET", "/usage/req-3"))["outcome"] == "failed"
    assert "req-9" in await admin("GET", "/usage/req-9", status=404)


async def test_usage_knows_times_in_two_forms(admin: Admin) -> None:
    await admin.cloud.ledger.record_usage([usage("req-1"), usage("req-2", created=NOON + 3600)])
    for since in (str(NOON + 1), "2026-03-01T12:00:01Z", "2026-03-01T13:00:01+01:00", "2026-03-01T12:00:01"):
        page = await admin.client.get("/usage", params={"by": "request", "since": since})
        assert [row["request_id"] for row in page.json()["rows"]] == ["req-2"]
    for wrong in ("yesterday", "nan", "1e300", ""):
        response = await admin.client.get("/usage", params={"until": wrong})
        assert response.status_code == 400 and "until" in response.text
    assert "colour" in await admin("GET", "/usage?by=colour", status=400)
    assert "limit" in await admin("GET", "/usage?by=request&limit=0", status=400)


async def test_a_node_is_drained_and_taken_back(admin: Admin, fleet: None) -> None:
    async def nodes() -> Any:
        return await admin("GET", "/nodes")

    (node,) = await until(nodes, "the node is heard of")
    assert node["id"] == "n1" and node["drain"] is False and node["devices"][0]["name"] == "Xeon"
    intents = Registry(admin.cloud.platform, subjects.INTENTS, NodeIntent)
    assert await admin("POST", "/nodes/n1/drain") == {"node": "n1", "drain": True}
    assert await intents.get("n1") == NodeIntent(node="n1", drain=True)
    assert (await nodes())[0]["drain"] is True
    assert await admin("POST", "/nodes/n1/drain", {"drain": False}) == {"node": "n1", "drain": False}
    assert (await nodes())[0]["drain"] is False
    assert "there are n1" in await admin("POST", "/nodes/n2/drain", status=404)


async def test_a_node_token_lets_a_machine_join(admin: Admin) -> None:
    answer = await admin("POST", "/node-tokens", {"ttl_s": 600})
    assert answer["url"] == admin.cloud.nats.url
    left = datetime.fromisoformat(answer["expires"]) - datetime.now(UTC)
    assert 500 < left.total_seconds() <= 600
    assert JoinToken.decode(answer["token"]).urls == [admin.cloud.nats.url]
    assert "only this machine" in answer["note"]  # this server listens on loopback
    for ttl in (0, -1, 1e9):
        assert "ttl_s" in await admin("POST", "/node-tokens", {"ttl_s": ttl}, status=400)


async def test_a_node_token_for_other_machines_says_no_more_than_it_must(cloud: Cloud) -> None:
    url = "tls://fabric.example.org:4222"
    async for admin in serve(cloud, cloud.ledger, fabric_url=url):
        answer = await admin("POST", "/node-tokens")
        assert answer["url"] == url and JoinToken.decode(answer["token"]).urls == [url]
        assert "note" not in answer


async def test_where_the_fabric_listens_everywhere_a_node_token_names_this_machine(cloud: Cloud) -> None:
    async with cloud.gateway(fabric_host="0.0.0.0"):
        token = (cloud.directory / "admin.token").read_text().strip()
        async with httpx.AsyncClient(
            base_url=(cloud.directory / "admin.url").read_text().strip(),
            headers={"authorization": f"Bearer {token}"},
            trust_env=False,
        ) as client:
            answer = (await client.post("/node-tokens", json={})).json()
    url = f"tls://{platform.node()}:{cloud.nats.port}"
    assert answer["url"] == url and JoinToken.decode(answer["token"]).urls == [url]
    assert "note" not in answer


async def test_a_process_without_ledger_or_authority_says_so(bare_admin: Admin) -> None:
    assert (await bare_admin("GET", "/status"))["gateways"] == []
    assert "no ledger" in await bare_admin("GET", "/keys", status=503)
    assert "no ledger" in await bare_admin("GET", "/usage", status=503)
    assert "can't sign" in await bare_admin("POST", "/node-tokens", status=503)


async def test_nobody_gets_in_without_the_token(admin: Admin) -> None:
    for header in (None, "", "Bearer", "Bearer wrong", "Basic eDp5", "Bearer é"):
        headers = {"authorization": header.encode()} if header is not None else {}
        async with httpx.AsyncClient(base_url=admin.client.base_url, trust_env=False) as stranger:
            for path in ("/status", "/nowhere"):
                response = await stranger.get(path, headers=headers)
                assert response.status_code == 401 and "admin.token" in response.json()["error"]["message"]


async def test_another_host_name_gets_nothing_even_with_the_token(admin: Admin) -> None:
    for host in ("evil.example", f"evil.example:{admin.port}", "127.0.0.1.evil.example", "[::2]:80", ""):
        response = await admin.client.get("/status", headers={"host": host})
        assert response.status_code == 421, host
    for host in ("localhost", f"LOCALHOST:{admin.port}", f"127.0.0.1:{admin.port}", "[::1]", "[::1]:80"):
        assert (await admin.client.get("/status", headers={"host": host})).status_code == 200, host


async def test_wrong_paths_methods_and_bodies_are_told_apart(admin: Admin) -> None:
    assert "there are /status, /replicas" in await admin("GET", "/nowhere", status=404)
    assert "takes GET or POST, not PATCH" in await admin("PATCH", "/keys", {}, status=405)
    assert "takes POST" in await admin("GET", "/nodes/n1/drain", status=405)
    assert "there is no /nodes//drain" in await admin("POST", "/nodes//drain", {"drain": False}, status=404)
    for body in (b"{", b"\xff", b'{"name": "\xff"}'):
        response = await admin.client.post("/keys", content=body)
        assert response.status_code == 400, response.text
        assert "not JSON" in response.json()["error"]["message"]


async def test_a_body_is_bounded_in_size(admin: Admin) -> None:
    response = await admin.client.post("/keys", content=b" " * (MAX_BODY + 1))
    assert response.status_code == 413
    assert await admin("GET", "/keys") == []


async def test_while_the_fabric_is_away_keys_are_revoked_all_the_same(admin: Admin) -> None:
    made = await admin("POST", "/keys")
    admin.cloud.nats.kill()
    try:
        revoked, deployments = await asyncio.gather(
            admin("DELETE", f"/keys/{made['id']}"), admin("GET", "/deployments", status=503)
        )
    finally:
        admin.cloud.nats.start()
    assert revoked["revoked"] is not None and revoked["published"] is False
    assert "the fabric does not answer" in deployments
    await until(lambda: admin.cloud.platform.connected, "the connection is back")


def test_the_token_is_made_once_and_is_private(tmp_path: Path) -> None:
    token = ensure_admin_token(tmp_path)
    assert len(token) == 64 and ensure_admin_token(tmp_path) == token
    assert stat.S_IMODE((tmp_path / "admin.token").stat().st_mode) == 0o600
