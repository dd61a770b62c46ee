"""Measurements: a table for people, JSON for machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.options import DataDir, settings
from springtide.core.errors import SetupError

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


@app.command()
def engine(
    model: Annotated[str | None, typer.Option(help="Which model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    concurrency: Annotated[str, typer.Option(help="Streams, with commas.")] = "1,16,64",
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt tokens.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output", min=2, help="Output tokens.")] = 128,
    json_file: JsonFile = None,
    data_dir: DataDir = None,
) -> None:
    """How fast the engine is by itself, no server in between."""
    from springtide.engine.bench import run

    chosen = settings(data_dir=data_dir, model=model)
    try:
        streams = [int(part) for part in concurrency.split(",")]
    except ValueError:
        raise SetupError(f"--concurrency takes numbers with commas, not {concurrency!r}") from None
    run(
        chosen.model,
        model_dir=chosen.model_path,
        concurrency=streams,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        json_file=json_file,
        dtype=dtype,
    )
