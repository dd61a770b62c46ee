"""Set up a virtual environment and install the project into it, with one line of progress.

Runs on a bare Python: standard library only. Says first how much will be downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

EXPECTED_MB = {"engine": 315, "dev": 60, "postgres": 4}  # wheels, on Linux x86-64, with the CPU build of torch
ROOT = Path(__file__).resolve().parent.parent
UNITS = {"kB": 1 / 1000, "MB": 1.0, "GB": 1000.0, "bytes": 1e-6}


def main() -> int:
    venv, extras, torch_index = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if sys.version_info < (3, 11):  # noqa: UP036  # the Python that runs this is whatever the user has
        return fail(
            f"Springtide needs Python 3.11 or newer; this is {sys.version.split()[0]}. Try: make PYTHON=python3.11"
        )
    if not (venv / "bin" / "python").exists() and not make_venv(venv):
        return 1
    total = sum(EXPECTED_MB[extra] for extra in extras.split(",") if not is_installed(venv, extra))
    say(f"Installing into {venv} ({extras}): up to {total} MB to download, less what pip has cached.")
    if not torch_index and sys.platform == "linux" and "engine" in extras:
        say(
            "If pip reaches for the CUDA build of PyTorch (gigabytes), stop and pass TORCH_INDEX=URL of the CPU wheels."
        )
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extras}]"]
    if torch_index:
        command += ["--extra-index-url", torch_index]
    return run_pip(command, total)


def make_venv(venv: Path) -> bool:
    try:
        import ensurepip  # noqa: F401  # absent where the distribution splits it off
        import venv as _venv  # noqa: F401
    except ImportError:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        fail(
            f"This Python has no venv module: install it (Debian, Ubuntu: apt install python{version}-venv), try again."
        )
        return False
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        fail(f"Could not make {venv}: {(result.stdout + result.stderr).strip()}")
        return False
    return True


def is_installed(venv: Path, extra: str) -> bool:
    return (venv / (".installed" if extra == "engine" else ".installed-dev")).exists()


def run_pip(command: list[str], total_mb: float) -> int:
    """pip with its many lines folded into one; all of them are kept for the case that it fails."""
    log: list[str] = []
    done_mb = current_mb = 0.0
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PIP_PROGRESS_BAR": "off"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        log.append(line)
        if match := re.search(r"Downloading (\S+).*\(([\d.]+) (kB|MB|GB|bytes)\)", line):
            done_mb, current_mb = done_mb + current_mb, float(match[2]) * UNITS[match[3]]
            show(f"downloading {short(match[1])} ({current_mb:.0f} MB)", done_mb, total_mb)
        elif match := re.search(r"(?:Processing|Using cached) (\S+)", line):
            show(f"taking {short(match[1])}", done_mb + current_mb, total_mb)
        elif line.startswith("Installing collected packages"):
            show("unpacking " + str(line.count(",") + 1) + " packages (a minute)", total_mb, total_mb)
    code = process.wait()
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    if code:
        sys.stderr.write("".join(log[-40:]))
        return fail("pip could not install; its last words stand above.")
    say("Installed.")
    return 0


def short(name: str) -> str:
    return name.rsplit("/", 1)[-1].split("-")[0]


def show(what: str, done: float, total: float) -> None:
    share = min(1.0, done / total) if total else 1.0
    bar = "#" * int(24 * share) + "-" * (24 - int(24 * share))
    line = f"[{bar}] {done:4.0f} of about {total:.0f} MB  {what}"
    if sys.stdout.isatty():
        print(f"\r\033[K{line[:118]}", end="", flush=True)
    elif "downloading" in what or "unpacking" in what:
        print(line, flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
