"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from springtide.core.config import Settings, load_settings

DataDir = Annotated[
    str | None, typer.Option("--data-dir", help="Where everything of this machine is kept.", metavar="DIR")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings(**flags: Any) -> Settings:
    """Settings with the given flags on top."""
    return load_settings(flags)
