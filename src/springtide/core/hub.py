"""Model files from the Hugging Face hub. They stay in the hub's own cache, where its other users find them too."""

from __future__ import annotations

import json
from pathlib import Path

from springtide.core.errors import SetupError
from springtide.core.fetch import LOCAL_MODEL_HINT, Progress

_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model"]
# The same weights once more, as their makers' own programs want them.
_IGNORED = ["*/*", "consolidated*.safetensors"]
_SHARD_INDEX = "model.safetensors.index.json"
_PATIENCE_S = 20.0
_TOO_MANY_REQUESTS = 429


def fetch_from_hub(repository: str, revision: str | None, progress: Progress) -> Path:
    """The folder of a repository's weights and tokenizer. Where the hub can't be reached, or HF_HUB_OFFLINE is set,
    what is in the cache is enough. `revision` is a branch, tag or commit; None: the main branch.

    Raises:
        SetupError: huggingface_hub is not installed, no such repository or revision, nothing in the cache where the
            hub can't be reached, or files are missing there.
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
        away = _why_it_is_away(repository, revision)
        if away:
            progress(f"taking {repository} from the hub's cache on this machine: {away}", 0, None)
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=_PATTERNS,
            ignore_patterns=_IGNORED,
            local_files_only=away is not None,
        )
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        raise SetupError(
            f"hf:{repository} could not be fetched: {_first_line(error)}",
            hint=f"check the name, the network, and HF_TOKEN for gated models; {LOCAL_MODEL_HINT}",
        ) from error
    _check_shards(Path(folder), repository)
    return Path(folder)


def _why_it_is_away(repository: str, revision: str | None) -> str | None:
    """Why the hub can't be asked; None if it answers.

    Raises:
        HfHubHTTPError: it answers that there is no such thing, or that it is not for us.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(repository, revision=revision, timeout=_PATIENCE_S)
    except HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code != _TOO_MANY_REQUESTS:
            raise
        return _first_line(error)
    except Exception as error:  # of the HTTP library that the client happens to use
        return _first_line(error)
    return None


def _check_shards(folder: Path, repository: str) -> None:
    """A cache may hold a part of a repository: a download that was broken off.

    Raises:
        SetupError: a file that the index of the weights names is missing.
    """
    try:
        named = {str(name) for name in json.loads((folder / _SHARD_INDEX).read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # all in one file, or an index that whoever reads it will refuse
    missing = sorted(name for name in named if not (folder / name).exists())
    if missing:
        raise SetupError(
            f"hf:{repository} is not whole in the hub's cache: {', '.join(missing)} missing below {folder}",
            hint="fetch it again with a network",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
