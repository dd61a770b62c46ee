"""The command tree. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from springtide.cli import bench, daily, node, processes, up
from springtide.core.errors import SpringtideError

app = typer.Typer(
    name="springtide",
    help="An open inference cloud: one OpenAI-compatible API over machines that nobody has to own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(up.up)
app.command()(up.down)
app.command()(daily.status)
app.command()(daily.chat)
app.command()(daily.deploy)
app.command()(daily.scale)
app.command()(daily.usage)
app.command()(daily.explain)
app.add_typer(daily.models, name="models")
app.add_typer(daily.keys, name="keys")
app.add_typer(node.app, name="node")
app.add_typer(bench.app, name="bench")
app.command()(processes.gateway)
app.command()(processes.controller)
app.command()(processes.agent)
app.command()(processes.replica)


def _version(value: bool) -> None:
    if value:
        from springtide import __version__

        typer.echo(f"springtide {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run a command; what we raise on purpose becomes one sentence and exit code 1."""
    try:
        app()
    except SpringtideError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
