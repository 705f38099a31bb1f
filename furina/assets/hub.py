"""The Hugging Face hub: what its cache holds, and in one sentence why it refuses the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from furina.assets import is_offline

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["model", "data set"]

LOGIN = "`hf auth login` or HF_TOKEN"
PAUSES = (0.5, 1.5)
"""Seconds to wait before asking again, if the hub is silent or fails."""


def cached_file(name: str, file: str) -> Path | None:
    """Return a file of a model in the hub's cache, None where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def cached_model(name: str) -> Path | None:
    """Return the folder of a model in the hub's cache, None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        # Said also where only what a load leaves out, such as other formats, was not fetched.
        incomplete = getattr(error, "snapshot_path", None)
        return Path(incomplete) if incomplete else None


@contextmanager
def only_cached_data() -> Iterator[None]:
    """Make `datasets` read only its cache; HF_HUB_OFFLINE would have to be set at its import."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def refusal(name: str, kind: Kind) -> str | None:
    """Return why the hub refuses a repository, None if it does not; offline it is not asked.

    The libraries that load from it would retry for a minute and not distinguish the reasons.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    file, repo_type = ("config.json", "model") if kind == "model" else ("README.md", "dataset")
    try:
        url = hf_hub_url(name, file, repo_type=repo_type)
    except HFValidationError as error:
        return reason(error, name, kind)
    if is_offline():
        return f"The {kind} {name} is not in the cache, and offline it cannot be fetched."
    for pause in (*PAUSES, None):
        try:
            get_hf_file_metadata(url)
            return None
        except EntryNotFoundError:  # the repository is there, and data need no card
            missing = (
                f"{name} holds no model that transformers loads: at {constants.ENDPOINT} it has no "
                f"{file}."
            )
            return missing if kind == "model" else None
        except Exception as error:  # which HTTP client the hub's library has is its own affair
            if pause is None or not _may_pass(error):
                return reason(error, name, kind) or _unreachable(error)
            time.sleep(pause)
    raise AssertionError("the last attempt returns")


def reason(error: BaseException, name: str, kind: Kind) -> str | None:
    """Return why the hub made loading a repository fail, None if something else did."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HFValidationError):
            return f"{name!r} is no name of a {kind} on the hub: that is ORGANISATION/NAME."
        # Of the many files that are asked for, a repository need not have all.
        if isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError):
            return _answer(cause, name, kind)
        if _is_transport(cause):
            return _unreachable(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _is_transport(error: BaseException) -> bool:
    """Return whether an error is of the HTTP client, httpx or its successor."""
    return type(error).__module__.startswith("httpx")


def _may_pass(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _is_transport(error) if status is None else status >= 500


def _unreachable(error: BaseException) -> str:
    from huggingface_hub import constants

    return (
        f"{constants.ENDPOINT} cannot be reached or stopped answering ({type(error).__name__}): "
        "check the network and HF_ENDPOINT, and try again."
    )


def _answer(error: HfHubHTTPError, name: str, kind: Kind) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError

    endpoint, status = constants.ENDPOINT, error.response.status_code
    page = f"{endpoint}/{'' if kind == 'model' else 'datasets/'}{name}"
    if isinstance(error, GatedRepoError):
        if status == 401:
            return f"{name} is gated: accept its licence at {page}, and log in with {LOGIN}."
        return (
            f"{name} is gated, and your token does not open it: accept its licence at {page} with "
            f"the token's account, or give another token with {LOGIN}."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no {kind} {name} at {endpoint}, or it is private: check the name, or log in "
            f"with {LOGIN}."
        )
    if isinstance(error, DisabledRepoError):
        return f"The {kind} {name} is disabled at {endpoint}: choose another."
    by_status = {
        401: f"{endpoint} refuses your token: log in anew with `hf auth login`, or correct or "
        "unset HF_TOKEN.",
        403: f"Your token does not open {page}: give another one with {LOGIN}.",
        429: f"{endpoint} has had too many requests from you: wait some minutes, or log in with "
        f"{LOGIN}, which allows more.",
    }
    other = f"{endpoint} answered {status} when asked for the {kind} {name}: try again later."
    return by_status.get(status, other)
