"""Where a checkpoint is, a folder or a commit on the Hub, and how it is asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .atomic import finish_replacement, replace_text


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "_commit_hash")
"""Arguments of `from_pretrained` that say where a checkpoint is."""


def at_one_commit(
    name_or_path: str | os.PathLike, place: Mapping[str, Any], file: str = CONFIG_NAME
) -> dict[str, Any]:
    """
    `place` with the commit in it that the branch or tag stands for now, so that all files are of one commit. `file` is
    one that there should be. In a local folder a save that was cut off is finished first.

    The commit is found before the first file is asked for: huggingface_hub takes the name of a commit and the content
    of a file from two requests, between which a branch can move.

    Raises:
        `ValueError`: on a token that is none, without showing it. `OSError`: if there is no such folder or repository,
            or it can't be read.
    """
    check_token(place.get("token"))
    if os.path.isdir(name_or_path):
        folder = Path(name_or_path, place.get("subfolder") or "")
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {str(folder)!r} here.")
        for saved in (folder, folder.parent):  # a corpus is saved with the checkpoint around it
            finish_replacement(saved)
        return dict(place)
    refuse_missing(name_or_path)
    name, branch = str(name_or_path), place.get("revision") or "main"
    commit = place.get("_commit_hash") or (branch if REGEX_COMMIT_HASH.fullmatch(branch) else None)
    if commit is not None:
        return {**place, "revision": commit}
    asked = {option: value for option, value in place.items() if option != "_commit_hash"}
    try:
        commit = hf_hub_download(name, file, **asked, dry_run=True).commit_hash
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no folder here, {file} of a repository with that name is not in the cache, and the Hub was "
            "not asked (offline) or gave no answer. Check the name and the connection."
        ) from error
    except EntryNotFoundError:
        return dict(place)
    except (HfHubHTTPError, ValueError):
        # Refused. transformers may still find it in the cache, or else says what to do.
        commit = extract_commit_hash(cached_file(name, file, **place), None)
        return {**place, "revision": commit}
    pinned = {**place, "revision": commit}
    if cached_file(name, file, **pinned, _raise_exceptions_for_missing_entries=False):
        note_commit(name, branch, commit, place.get("cache_dir"))
    return pinned


def look_for(name_or_path: str | os.PathLike, name: str, place: Mapping[str, Any]) -> str | None:
    """A file of a folder, or of a repository on the Hub; `None` if there is no such file in it. Without such a folder
    or repository an `OSError`."""
    if not os.path.isdir(name_or_path):
        refuse_missing(name_or_path)
    return cached_file(name_or_path, name, **place, _raise_exceptions_for_missing_entries=False)


def is_hub_id(name: Any) -> bool:
    """Whether `name` can be the id of a repository: letters, digits, `-`, `_` and `.`, with one `/` at most."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def refuse_missing(name_or_path: str | os.PathLike) -> None:
    """Raises `FileNotFoundError` on the path of a folder that is not here, which no repository on the Hub can have as
    its name."""
    if not is_hub_id(str(name_or_path)):
        raise FileNotFoundError(
            f"There is no folder {str(name_or_path)!r} here, and a repository on the Hub has no such name."
        )


def commit_note(name: str, branch: str, cache_dir: str | os.PathLike | None) -> Path:
    """The file of huggingface_hub's cache in which the commit of a branch is noted down."""
    return Path(cache_dir or HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs" / branch


def note_commit(name: str, branch: str, commit: str, cache_dir: str | os.PathLike | None) -> None:
    """Which commit `branch` was last seen at, where huggingface_hub looks it up when there is no network. It notes
    this itself only where a file is asked for by branch."""
    note = commit_note(name, branch, cache_dir)
    if not note.is_file() or note.read_text(encoding="utf-8") != commit:
        with contextlib.suppress(OSError):  # of a read-only cache: whoever fills it has noted a commit
            replace_text(note, commit)


def refuse_variant(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` on `variant=`, which transformers takes for another file name: a checkpoint here has one."""
    if options.get("variant") is not None:
        raise ValueError(
            f"variant={options['variant']!r}: checkpoints of hf_vs2 have one file of weights, {SAFE_WEIGHTS_NAME}. "
            "Choose the precision with dtype=; give a variant of a CLIP as a loaded model, clip=."
        )


def one_dtype(options: Mapping[str, Any]) -> dict[str, Any]:
    """Loading arguments in which `torch_dtype=`, the older name, has become `dtype=`. Both, of different values, are a
    `ValueError`."""
    options = dict(options)
    older = options.pop("torch_dtype", None)
    if older is not None:
        dtype = options.setdefault("dtype", older)
        if str(dtype).removeprefix("torch.") != str(older).removeprefix("torch."):
            raise ValueError(f"dtype={dtype!r} and torch_dtype={older!r} mean the same and differ: give one of them.")
    return options


def check_token(token: str | bool | None) -> None:
    """The HTTP library puts a header that can't be sent, token and all, into its message; this message does not show
    it."""
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            "token= holds a space, a line break or another character that no token has: take the token alone (of a "
            "line read from a file: .strip())."
        )
