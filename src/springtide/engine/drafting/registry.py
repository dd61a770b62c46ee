"""Which drafters there are."""

from __future__ import annotations

from springtide.core.errors import SetupError
from springtide.engine.drafting.base import Drafter
from springtide.engine.drafting.ngram import NgramDrafter


def choose_drafter(name: str) -> Drafter | None:
    """The drafter called `name`; None for "none".

    Raises:
        SetupError: there is none of that name.
    """
    if name == "none":
        return None
    if name == "ngram":
        return NgramDrafter()
    raise SetupError(f"there is no drafter {name!r}", hint="there are: none, ngram")
