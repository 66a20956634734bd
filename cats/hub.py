"""The edge of the download path: no network, gated models, damaged files, pickles; each becomes one sentence.

A cut connection goes on in the middle of a file; after the process has ended, files that are whole are kept and the one
that was not is fetched again from its beginning (huggingface_hub 2 gives every process a partial file of its own).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

_CONVERSION_SWITCH = "DISABLE_SAFETENSORS_CONVERSION"


def reachable() -> bool:
    """Whether the hub answers at all (any status will do), asked once with a short timeout."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the session's own error classes differ between versions of huggingface_hub
        return False
    return True


def source(where: str) -> str:
    """``where`` itself, or the cached copy of a hub model while the hub is out of reach.

    Without it, loading with no network took 240 s, cached or not: the clients retry every file of the model with
    growing pauses. Raises OSError when there is neither a network nor a cached copy.
    """
    if Path(where).is_dir() or reachable():
        return where
    try:
        return str(snapshot_download(where, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise OSError(f"cannot connect to {constants.ENDPOINT}, and it is not in the download cache") from error


@contextmanager
def loading(spec: str) -> Iterator[None]:
    """Turn what the libraries raise while they load ``spec`` into one sentence (OSError, or ValueError as it was).

    Inside, transformers does not ask the hub's conversion service to unpickle a repository without safetensors.
    """
    before = os.environ.get(_CONVERSION_SWITCH)
    os.environ[_CONVERSION_SWITCH] = "1"
    try:
        yield
    except (RuntimeError, ImportError) as error:  # memory, devices, packages: not what is loaded, but for one
        if "ignore_mismatched_sizes" in str(error):
            raise OSError(f"{spec} has weights of other shapes than its config.json gives") from error
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, JSONDecodeError):
            raise ValueError(f"{spec} cannot be loaded: {_one_line(error)}") from error
        raise OSError(_sentence(spec, error)) from error
    finally:
        if before is None:
            del os.environ[_CONVERSION_SWITCH]
        else:
            os.environ[_CONVERSION_SWITCH] = before


def _sentence(spec: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return (
            f"{spec} is a gated model: ask for access at https://huggingface.co/{spec}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    text = _one_line(error)
    if not isinstance(error, OSError) or "valid JSON" in text:  # what parsers raise: safetensors, json, tokenizers
        cause = f"{type(error).__name__}: {text}"
        return f"{spec} has a damaged file ({cause}): delete its folder in the download cache, or fetch it again"
    if "safetensors" in text and ("use_safetensors" in text or "no file named" in text):
        return f"{spec} has no safetensors weights; pickled weights are not loaded, since opening them can run code"
    return f"{spec} cannot be loaded: {text}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
