"""README says nothing that was not tried: its code blocks run, against a platform with the default model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MODELS, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.model]
README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    one = Platform(tmp_path_factory.mktemp("readme") / ".springtide")
    try:
        yield one.ready(300)
    finally:
        one.stop()


def run(command: list[str], real: Platform) -> str:
    """Run as if the platform were in the home folder and on the port that README names."""
    there = [part.replace("http://127.0.0.1:8000", real.url) for part in command]
    env = {**os.environ, "HOME": str(real.data_dir.parent), "SPRINGTIDE_MODEL_DIR": MODELS}
    result = subprocess.run(there, capture_output=True, text=True, timeout=240, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_curl_line(real: Platform) -> None:
    (curl,) = [block for block in blocks("sh") if block.startswith("curl")]
    answer = run(["bash", "-c", curl], real)
    assert answer.startswith("data: {") and answer.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("number", range(2), ids=["openai", "offline"])
def test_the_python_examples(real: Platform, number: int) -> None:
    assert len(blocks("python")) == 2
    assert len(run([sys.executable, "-c", blocks("python")[number]], real).split()) > 10


def test_every_command_in_the_table_exists() -> None:
    from typer.main import get_command

    from springtide.cli.main import app

    known = get_command(app)
    for row in re.findall(r"^\| (`springtide [^|]+(?:\\\|[^|]+)*)\|", README.read_text(), re.MULTILINE):
        for word in re.findall(r"`(?:springtide )?([a-z]+)", row):
            assert word in known.commands, word  # type: ignore[attr-defined]
