"""Measurements: a table for people, JSON for machines."""

from __future__ import annotations

from enum import StrEnum
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


class FleetRun(StrEnum):
    CHAOS = "chaos"
    GATEWAYS = "gateways"
    FAIRNESS = "fairness"


class FleetEngine(StrEnum):
    MOCK = "mock"
    REAL = "real"


@app.command()
def fleet(
    only: Annotated[FleetRun | None, typer.Option(help="One of the runs; all of them by default.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1.0, help="How long each run, or window, lasts.")] = None,
    seed: Annotated[int, typer.Option(help="Of faults and questions.")] = 1,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once in chaos.")] = 200,
    every: Annotated[float | None, typer.Option(min=0.1, help="Seconds between two faults.")] = None,
    fabric_servers: Annotated[int, typer.Option(min=1, max=5, help="NATS servers.")] = 1,
    engine: Annotated[FleetEngine, typer.Option(help="real: seeded streams of the default model.")] = FleetEngine.MOCK,
    json_file: JsonFile = None,
    data_dir: DataDir = None,
) -> None:
    """Whether nothing is lost in chaos, and everybody gets a fair share of a full fleet."""
    from springtide.cli.bench_fleet import Choice, run

    chosen = settings(data_dir=data_dir)
    run(
        Choice(
            only=only,
            seconds=seconds,
            seed=seed,
            streams=streams,
            every=every,
            fabric_servers=fabric_servers,
            engine="springtide" if engine is FleetEngine.REAL else "mock",
            model=chosen.model,
            model_dir=chosen.model_path,
        ),
        json_file,
    )
