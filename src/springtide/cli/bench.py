"""Measurements: a table for people, JSON for machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure: a table for people, JSON for machines.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.", metavar="FILE")]


@app.command()
def api(
    seconds: Annotated[float, typer.Option(min=1.0, help="How long each load lasts.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each; the median is kept.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """What the platform adds to an engine: latency, requests and chunks per second."""
    from springtide.cli.bench_api import run

    run(seconds, runs, json_file)
