"""Settings: flags over `SPRINGTIDE_*` over `springtide.toml` over defaults. An unknown key is an error."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from springtide.core.errors import SetupError

DEFAULT_MODEL = "smollm2-135m-instruct"
ENV_PREFIX = "SPRINGTIDE_"
_NOT_SETTINGS = {"SPRINGTIDE_CONFIG", "SPRINGTIDE_PARENT_FD", "SPRINGTIDE_JOIN_TOKEN"}


def _default_data_dir() -> str:
    return str(Path.home() / ".springtide")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of one machine, with their defaults. Sizes in bytes, times in seconds.

    `fabric_url` empty means: start a NATS server here; several, with commas between them, are the servers of one
    cluster. `fabric_port` 0 means: a free one, remembered in the data dir. `database_url` empty means SQLite in the
    data dir. `model_dir` empty means `<data_dir>/models`.
    `grace` is what running requests get when a process stops.

    A timeout of 0 is none. `connect_timeout`: for a replica to accept a request; `first_token_timeout` and
    `inter_token_timeout`: for the first and for each further word of an attempt, after which it goes on elsewhere;
    `total_timeout`: for a whole request. `hedge_after`: without a word for so long, a second replica is asked as
    well, and the first to speak is heard; 0 is off. `retry_share` and `retry_floor` pace attempts after the first:
    a share of the requests, and so many a second in any case. `step_timeout`: for one step of an engine; a replica
    that is stuck in one ends, and is started again.
    """

    data_dir: str = msgspec.field(default_factory=_default_data_dir)
    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int = 0
    model: str = DEFAULT_MODEL
    engine: str = "springtide"
    dtype: str = "auto"
    replicas: int = 1
    region: str = "local"
    site: str = "local"
    fabric_url: str = ""
    fabric_host: str = "127.0.0.1"
    fabric_port: int = 0
    nats_server: str = ""
    database_url: str = ""
    model_dir: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    max_body_bytes: int = 16 * 1024 * 1024
    queue_timeout: float = 600.0
    silent_wait: float = 10.0
    connect_timeout: float = 5.0
    first_token_timeout: float = 0.0
    inter_token_timeout: float = 60.0
    total_timeout: float = 0.0
    hedge_after: float = 0.0
    retry_share: float = 0.2
    retry_floor: float = 50.0
    step_timeout: float = 30.0
    grace: float = 10.0
    cors_origins: str = "*"
    log_level: str = "INFO"

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser()

    @property
    def model_path(self) -> Path:
        return Path(self.model_dir).expanduser() if self.model_dir else self.data_path / "models"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
) -> Settings:
    """Settings from all four places; a flag that is None was not given.

    Raises:
        SetupError: an unknown key (naming the nearest known one), a value of the wrong type, a file that
            can't be read.
    """
    environ = os.environ if environ is None else environ
    file = config_file or Path(environ.get("SPRINGTIDE_CONFIG", "springtide.toml"))
    merged: dict[str, Any] = {}
    merged.update(_from_file(file, required=config_file is not None or "SPRINGTIDE_CONFIG" in environ))
    merged.update(_from_environ(environ))
    merged.update({key: value for key, value in (flags or {}).items() if value is not None})
    _refuse_unknown(merged, "flag")
    try:
        return msgspec.convert(merged, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SetupError(f"a setting has a wrong value: {error}") from None


def _from_file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if required:
            raise SetupError(f"the configuration file {path} does not exist") from None
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"the configuration file {path} can't be read: {error}") from None
    _refuse_unknown(values, f"key in {path}")
    return values


def _from_environ(environ: Mapping[str, str]) -> dict[str, str]:
    names = [name for name in environ if name.startswith(ENV_PREFIX) and name not in _NOT_SETTINGS]
    values = {name.removeprefix(ENV_PREFIX).lower(): environ[name] for name in names}
    _refuse_unknown(values, "environment variable", show=lambda key: ENV_PREFIX + key.upper())
    return values


def _refuse_unknown(values: Mapping[str, Any], what: str, show: Any = str) -> None:
    known = Settings.__struct_fields__
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise SetupError(f"unknown {what} {show(key)}", hint=f"did you mean {show(near[0])}?")
