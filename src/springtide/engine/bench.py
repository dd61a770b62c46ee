"""How fast the engine is by itself: N sequences at once, with prompts of random tokens, no server in between."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from springtide.core.config import DEFAULT_MODEL, load_settings
from springtide.core.engine_api import SequenceRequest
from springtide.core.figures import Figure, cpu_name, versions, write_json
from springtide.core.request import SamplingParams
from springtide.core.store import ModelStore
from springtide.engine.config import EngineConfig
from springtide.engine.llm_engine import LLMEngine

RUNS = 3  # of each row; its median run, by output rate, is reported


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load: `concurrency` sequences that start together.

    output_tok_s: all output tokens over the whole time, prompts included. prefill_tok_s: all prompt tokens over
    the time until the last sequence's first token. TTFT and TPOT: medians over the sequences. peak_rss_mb: of
    this process so far.
    """

    concurrency: int
    input_tokens: int
    output_tokens: int
    output_tok_s: float
    prefill_tok_s: float
    ttft_ms_p50: float
    tpot_ms_p50: float
    peak_rss_mb: float


def run(
    model: str = DEFAULT_MODEL,
    *,
    model_dir: Path | None = None,
    concurrency: Sequence[int] = (1, 16, 64),
    input_tokens: int = 128,
    output_tokens: int = 128,
    json_file: Path | None = None,
    **engine_options: Any,
) -> dict[str, Any]:
    """Measure, print a table, write JSON if a file is named; the result as the JSON has it.

    Raises:
        SetupError: no such model, or not enough memory.
    """
    files = ModelStore(model_dir or load_settings().model_path).resolve(model)
    config = EngineConfig.from_options({"max_num_seqs": max(concurrency), **engine_options})
    engine = LLMEngine.from_files(files, config)
    measure(engine, 1, input_tokens, 2)  # kernels compile, weights come into memory
    rows = [median_run(engine, count, input_tokens, output_tokens) for count in concurrency]
    result = {
        "model": files.name,
        "device": f"{engine.info.device}: {cpu_name()}",
        "dtype": engine.info.dtype,
        "versions": versions("torch", "numba"),
        "rows": [msgspec.to_builtins(row) for row in rows],
    }
    _print(result, rows)
    write_json(json_file, result, figures(rows))
    return result


def median_run(engine: LLMEngine, concurrency: int, input_tokens: int, output_tokens: int) -> Row:
    runs = [measure(engine, concurrency, input_tokens, output_tokens) for _ in range(RUNS)]
    return sorted(runs, key=lambda row: row.output_tok_s)[RUNS // 2]


def measure(engine: LLMEngine, concurrency: int, input_tokens: int, output_tokens: int) -> Row:
    """One run of `concurrency` greedy sequences, each of exactly these lengths (at least two output tokens)."""
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    arrivals: dict[str, list[float]] = {}
    start = time.perf_counter()
    for number in range(concurrency):
        prompt = rng.integers(0, engine.info.vocab_size, input_tokens).tolist()
        arrivals[str(number)] = []
        engine.add(SequenceRequest(id=str(number), prompt=prompt, sampling=sampling, cache_salt=None))
    while engine.has_work():
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            arrivals[output.id] += [now] * len(output.token_ids)
    firsts = [times[0] for times in arrivals.values()]
    gaps = [(times[-1] - times[0]) / (output_tokens - 1) for times in arrivals.values()]
    return Row(
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        output_tok_s=round(concurrency * output_tokens / max(times[-1] for times in arrivals.values()), 1),
        prefill_tok_s=round(concurrency * input_tokens / max(firsts), 1),
        ttft_ms_p50=round(1000 * statistics.median(firsts), 2),
        tpot_ms_p50=round(1000 * statistics.median(gaps), 2),
        peak_rss_mb=round(_peak_rss() / 1e6, 1),
    )


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The output rate at each concurrency. No goal is set for it: it is there to be compared."""
    return [
        Figure(
            name=f"output tokens per second at {row.concurrency}",
            value=row.output_tok_s,
            unit="tok/s",
            goal="none",
            holds=None,
            reason="no goal is set",
        )
        for row in rows
    ]


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print(result: dict[str, Any], rows: Sequence[Row]) -> None:
    table = Table(title=f"{result['model']}, {result['dtype']}, {result['device']}")
    for heading in ("streams", "in / out", "output tok/s", "prefill tok/s", "TTFT p50 ms", "TPOT p50 ms", "RSS MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.concurrency),
            f"{row.input_tokens} / {row.output_tokens}",
            f"{row.output_tok_s:,.1f}",
            f"{row.prefill_tok_s:,.1f}",
            f"{row.ttft_ms_p50:,.1f}",
            f"{row.tpot_ms_p50:,.2f}",
            f"{row.peak_rss_mb:,.0f}",
        )
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--concurrency", default="1,16,64", help="numbers of sequences at once, by commas")
    parser.add_argument("--input", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer, at least 2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures here", metavar="FILE")
    given = parser.parse_args(arguments)
    run(
        given.model,
        concurrency=[int(count) for count in given.concurrency.split(",")],
        input_tokens=given.input,
        output_tokens=given.output,
        json_file=given.json,
        dtype=given.dtype,
    )
