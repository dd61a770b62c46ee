"""The fleet's machines: tokens, joining, listing, draining."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from springtide.cli.client import AdminClient
from springtide.cli.daily import _print_json, _table
from springtide.cli.options import AsJson, DataDir, settings
from springtide.core.errors import SetupError

app = typer.Typer(help="The machines of the fleet.", no_args_is_help=True)


@app.command()
def token(
    ttl: Annotated[float, typer.Option(help="Seconds until it expires.")] = 3600.0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a token with which one machine can join, once."""
    answer = AdminClient.of(settings(data_dir=data_dir).data_path).call("POST", "/node-tokens", {"ttl_s": ttl})
    if note := answer.get("note"):  # not on stdout, which holds the token alone where it is read by a program
        print(f"note: {note}", file=sys.stderr)
        print("hint: start the platform with --fabric-host ADDRESS (0.0.0.0 for all of them)", file=sys.stderr)
    if as_json:
        return _print_json(answer)
    print(answer["token"])
    if os.isatty(1):
        print(f"\non the other machine:  springtide node join {answer['url']} --token TOKEN")


@app.command()
def join(
    url: Annotated[str, typer.Argument(help="Where the fabric listens, tls://HOST:PORT.")],
    token: Annotated[
        str | None,
        typer.Option(
            help="The token; @FILE reads it from a file. Not needed to come back.", envvar="SPRINGTIDE_JOIN_TOKEN"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The machine's name in the fleet; its host name by default.")] = None,
    region: Annotated[str | None, typer.Option(help="Its region.")] = None,
    site: Annotated[str | None, typer.Option(help="Its site: nodes that reach each other directly.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Join a fleet by dialling out, and serve until Ctrl-C (which drains)."""
    from springtide.cli.processes import run_until_signal
    from springtide.fleet.agent import run_agent

    chosen = settings(data_dir=data_dir, region=region, site=site)
    node = re.sub(r"[^a-z0-9-]+", "-", (name or platform.node() or "node").lower()).strip("-") or "node"
    directory = chosen.data_path
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"the data dir {directory} can't be made: {error.strerror}", hint="pass --data-dir") from None
    path = directory / f"node-{node}.creds"
    _obtain(path, node, url, token)
    print(f"joined as {node}; serving until Ctrl-C", flush=True)
    run_until_signal("agent", chosen, lambda stop: run_agent(path, node, chosen, directory, stop))


def _obtain(path: Path, node: str, url: str, token: str | None) -> None:
    """See that `path` holds credentials: those of last time while they are good, else new ones for the token."""
    from springtide.fabric.credentials import Credentials
    from springtide.fabric.join import join as exchange

    previous = Credentials.load(path) if path.exists() else None
    if token is not None:
        asyncio.run(exchange(_token(token), node, [url], previous=previous)).save(path)
    elif previous is None:
        raise SetupError("this machine has not joined yet", hint="get a token: springtide node token; pass --token")
    elif previous.expires is not None and previous.expires < time.time():
        raise SetupError("this machine's credentials have expired", hint="get a new token: springtide node token")


def _token(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text().strip()
    except OSError as error:
        raise SetupError(f"the token file can't be read: {error}") from None


@app.command("list")
def list_nodes(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """The machines that are alive."""
    nodes: list[dict[str, Any]] = AdminClient.of(settings(data_dir=data_dir).data_path).call("GET", "/nodes")
    if as_json:
        return _print_json(nodes)
    _table(
        "Nodes",
        ["id", "region", "site", "state", "devices"],
        [[n["id"], n["region"], n["site"], n["state"], ", ".join(d["name"] for d in n["devices"])] for n in nodes],
    )


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="The node's id.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it serve again.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Let a machine finish what it runs and take nothing new."""
    AdminClient.of(settings(data_dir=data_dir).data_path).call("POST", f"/nodes/{node}/drain", {"drain": not undo})
    print(f"{node}: {'serving again' if undo else 'draining'}")
