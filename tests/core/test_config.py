"""Flags over environment over file over defaults, and nothing that is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from springtide.core.config import DEFAULT_MODEL, Settings, load_settings
from springtide.core.errors import SetupError


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "springtide.toml"
    path.write_text('port = 1\nhost = "0.0.0.0"\nregion = "file"\n')
    return path


def test_without_anything_the_defaults_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(environ={})
    assert settings == Settings()
    assert settings.model == DEFAULT_MODEL
    assert settings.model_path == settings.data_path / "models"


def test_a_flag_wins_over_the_environment_and_that_over_the_file(file):
    environ = {"SPRINGTIDE_PORT": "2", "SPRINGTIDE_REGION": "env", "PATH": "/bin"}
    settings = load_settings({"port": 3, "host": None}, environ=environ, config_file=file)
    assert (settings.port, settings.region, settings.host) == (3, "env", "0.0.0.0")


def test_the_environment_may_name_the_file(file):
    assert load_settings(environ={"SPRINGTIDE_CONFIG": str(file)}).port == 1


def test_a_file_in_the_working_directory_is_read(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert load_settings(environ={}).region == "file"


def test_text_of_the_environment_becomes_the_type_of_the_setting():
    environ = {"SPRINGTIDE_PORT": "9000", "SPRINGTIDE_QUEUE_TIMEOUT": "1.5"}
    settings = load_settings(environ=environ)
    assert (settings.port, settings.queue_timeout) == (9000, 1.5)


def test_a_model_folder_of_its_own(tmp_path):
    assert load_settings({"model_dir": str(tmp_path)}, environ={}).model_path == tmp_path


def test_an_unknown_key_names_the_nearest_known_one(file):
    file.write_text("prot = 1\n")
    with pytest.raises(SetupError, match=r"unknown key in .*springtide\.toml prot \(did you mean port\?\)"):
        load_settings(environ={}, config_file=file)
    with pytest.raises(SetupError, match=r"unknown environment variable SPRINGTIDE_REGOIN .*SPRINGTIDE_REGION"):
        load_settings(environ={"SPRINGTIDE_REGOIN": "x"})
    with pytest.raises(SetupError, match=r"unknown flag modle \(did you mean model\?\)"):
        load_settings({"modle": "x"}, environ={})


def test_a_value_of_the_wrong_type_is_named():
    with pytest.raises(SetupError, match=r"wrong value.*port"):
        load_settings(environ={"SPRINGTIDE_PORT": "many"})


@pytest.mark.parametrize("content", [b"port = \n", b"\xff\xfe"])
def test_a_file_that_can_not_be_read_is_named(file, content):
    file.write_bytes(content)
    with pytest.raises(SetupError, match=r"springtide\.toml can't be read"):
        load_settings(environ={}, config_file=file)


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(SetupError, match="does not exist"):
        load_settings(environ={}, config_file=tmp_path / "none.toml")
    with pytest.raises(SetupError, match="does not exist"):
        load_settings(environ={"SPRINGTIDE_CONFIG": str(tmp_path / "none.toml")})
