"""What `make install` says and asks of pip. pip itself is a stub: nothing is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "install.py"
INDEX = "https://wheels.example.org/cpu"
DOWNLOADS = """
print("Collecting torch")
print("  Downloading torch-2.11.0-cp311-linux_x86_64.whl (190.5 MB)")
print("Installing collected packages: torch, numpy")
"""


class Installation:
    """A folder for the virtual environment, in which `python` notes its arguments and does as it is told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.venv = directory / "venv"
        self._arguments = directory / "arguments.json"

    def make_venv(self, pip: str = DOWNLOADS) -> None:
        python = self.venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        note = f"import json, sys\njson.dump(sys.argv[1:], open({str(self._arguments)!r}, 'w'))\n"
        python.write_text(f"#!{sys.executable}\n{note}{pip}")
        python.chmod(0o755)

    def run(self, extras: str = "engine", torch_index: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        """The script as make runs it, on a Python that has its standard library alone (-S)."""
        command = [sys.executable, "-S", str(SCRIPT), str(self.venv), extras, torch_index]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})

    def pip_arguments(self) -> list[str]:
        arguments: list[str] = json.loads(self._arguments.read_text())
        return arguments


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


@pytest.mark.parametrize("module", ["ensurepip", "venv"])
def test_a_python_without_its_venv_module_gets_one_sentence(installation: Installation, module: str) -> None:
    missing = installation.directory / "missing"
    missing.mkdir()
    (missing / f"{module}.py").write_text("raise ImportError('split off by the distribution')")
    result = installation.run(PYTHONPATH=str(missing))
    assert result.returncode == 1 and result.stdout == ""
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    assert len(result.stderr.splitlines()) == 1 and f"apt install {package}" in result.stderr
    assert not installation.venv.exists()


def test_a_venv_that_can_not_be_made_says_why_and_leaves_nothing(installation: Installation) -> None:
    installation.venv.write_text("in the way")
    result = installation.run()
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"Could not make {installation.venv}: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("extras", "installed", "megabytes"),
    [("engine", [], 315), ("engine,dev,postgres", [], 379), ("engine,dev,postgres", [".installed"], 64)],
)
def test_the_size_is_said_before_anything_is_fetched(
    installation: Installation, extras: str, installed: list[str], megabytes: int
) -> None:
    installation.make_venv()
    for marker in installed:
        (installation.venv / marker).touch()
    result = installation.run(extras)
    assert result.returncode == 0, result.stderr
    first, *rest = result.stdout.splitlines()
    assert f"({extras}): up to {megabytes} MB to download" in first
    assert any("downloading torch (190 MB)" in line for line in rest)
    assert rest[-1] == "Installed."


def test_pip_gets_the_pinned_versions_and_the_extras(installation: Installation) -> None:
    installation.make_venv()
    installation.run("engine,dev")
    arguments = installation.pip_arguments()
    root = SCRIPT.parent.parent
    assert arguments[:3] == ["-m", "pip", "install"]
    assert arguments[arguments.index("-c") + 1] == str(root / "constraints.txt")
    assert arguments[arguments.index("-e") + 1] == f"{root}[engine,dev]"


def test_an_index_for_torch_is_one_more_index(installation: Installation) -> None:
    installation.make_venv()
    result = installation.run(torch_index=INDEX)
    arguments = installation.pip_arguments()
    assert arguments[arguments.index("--extra-index-url") + 1] == INDEX
    assert "TORCH_INDEX" not in result.stdout


def test_without_an_index_for_torch_none_is_passed_but_named(installation: Installation) -> None:
    installation.make_venv()
    result = installation.run()
    assert "--extra-index-url" not in installation.pip_arguments()
    assert ("TORCH_INDEX=URL" in result.stdout) == (sys.platform == "linux")


def test_when_pip_fails_its_last_words_are_shown(installation: Installation) -> None:
    installation.make_venv(
        "for n in range(100): print(f'line {n}', flush=True)\nprint('no space left', file=sys.stderr)\nsys.exit(2)"
    )
    result = installation.run()
    assert result.returncode == 1
    *words, verdict = result.stderr.splitlines()
    assert words[-2:] == ["line 99", "no space left"]
    assert "line 10" not in words
    assert "pip could not install" in verdict
    assert "Installed." not in result.stdout
