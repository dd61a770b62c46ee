"""Springtide, an open inference cloud.

`LLM` is loaded on first use, so that importing any room but the engine never imports torch.
"""

from typing import TYPE_CHECKING, Any

from springtide.core.request import SamplingParams

if TYPE_CHECKING:
    from springtide.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from springtide.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'springtide' has no attribute {name!r}")
