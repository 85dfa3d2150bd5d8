"""Checkpoints to the Hub: what `push_to_hub` of every model here does, and the function for folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers.utils import CONFIG_NAME

from ...config.packaged_code import PackagedCode
from ..atomic import replace_files
from ..checkpoint_folder import TENSOR_FILES, VS2_TYPE, CheckpointFolder
from ..digests import digests_in
from ..json_files import read_json, write_json
from ..place import refuse_variant
from ..progress import without_loading_bars
from ..weight_files import check_numbers
from .shim import SHIM, SHIM_NAME, auto_map


if TYPE_CHECKING:
    from ..report import Results


def push_to_hub(
    path_or_model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    results: Results | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    **save_options: Any,
) -> CommitInfo:
    """
    Put a checkpoint on the Hub, in one commit: an SAE, a VS2 model, or a folder of SAEs (one a subfolder).

    Pushing the same again makes no commit. After an interruption, push again: files that arrived are not sent twice.
    The model card is written from the checkpoint and the result file. A card that somebody has edited, here or on the
    Hub, keeps its text, and its metadata are brought up to date. Of a folder only the checkpoint goes up, not the
    training state and the log.

    Args:
        path_or_model (path or model): the folder, or a [`SAEModel`] or [`VS2CLIPForZeroShot`].
        repo_id (`str`): `owner/name`, or `name` under your own account. The repository is made if there is none.
        private (`bool`, *optional*): for a new repository. With `True`, an existing public one is refused.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit as a pull request against `main`.
        revision (`str`, *optional*): branch to push to, made if there is none; `"refs/pr/1"` adds to a pull request.
        tag (`str`, *optional*): git tag to give the commit.
        token (`str` or `bool`, *optional*): by default the one that `hf auth login` stored, or `HF_TOKEN`.
        commit_message (`str`, *optional*), commit_description (`str`, *optional*): of the commit.
        results ([`EvaluationResult`] or path, *optional*): the result file for the card, uploaded as `results.json`;
            by default the one in the folder. If its `meta` has a `task_id`, an entry for that benchmark's leaderboard
            is written.
        license (`str`, *optional*): the Hub's identifier of your licence for the checkpoint, such as `"apache-2.0"`.
        tags (`list[str]`, *optional*): further tags for the card.
        save_options: for a model, arguments of its `save_pretrained`, such as `full=True`.

    Returns:
        `CommitInfo`: the commit; as a string its URL. With `create_pr` its `pr_url` is set. The latest commit if there
            was nothing to change.

    Raises:
        `OSError`: if the folder is missing, or the Hub refuses (an `HfHubHTTPError`, with its reason).
        `ValueError`: if it holds no checkpoint, or on options that contradict each other or what is on the Hub.
        `TypeError`: on anything else than a path or one of our models.
    """
    if create_pr and (tag or revision not in (None, "main")):
        what = "tag=" if tag else "revision="
        raise ValueError(
            f"create_pr=True proposes a commit to main, so {what} can't be given with it. To add to a pull request "
            "that is open, use revision='refs/pr/<number>' alone."
        )
    from .card_results import read_results
    from .hub_push import Push

    with tempfile.TemporaryDirectory() as scratch:
        folder = _as_folder(path_or_model, scratch, save_options)
        push = Push(
            folder,
            repo_id,
            results=read_results(folder, results),
            license=license,
            tags=(tags,) if isinstance(tags, str) else tuple(tags),
            private=private,
            create_pr=create_pr,
            revision=revision,
            tag=tag,
            token=token,
        )
        return push.run(commit_message or f"Upload {_kind(folder)} with hf_vs2", commit_description)


class HubMixin(PackagedCode):
    """
    `save_pretrained` that writes the model card too, and `push_to_hub` that respects an edited one. (transformers' own
    overwrites the card on the Hub.) Put it before `PreTrainedModel` among the bases.
    """

    @without_loading_bars()
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """`PreTrainedModel.save_pretrained`, and a model card. `push_to_hub=True` then pushes the folder; its options
        are those of [`push_to_hub`]."""
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        refuse_variant(kwargs)
        save = super().save_pretrained  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            save(save_directory, **kwargs)
            return

        def write(scratch: Path) -> None:
            state = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
            check_numbers(state.items(), "The model to be saved", "Nobody could use it.")
            self.save_beside(scratch, earlier=Path(save_directory), token=kwargs.get("token"))
            save(scratch, **kwargs)
            self.config.digests = digests_in(scratch)  # type: ignore[attr-defined]
            self.config.save_pretrained(scratch)  # type: ignore[attr-defined]
            (scratch / SHIM_NAME).write_text(SHIM, encoding="utf-8")
            written = read_json(scratch / CONFIG_NAME)
            written["auto_map"] = auto_map(written["model_type"])
            write_json(scratch / CONFIG_NAME, written, indent=2, sort_keys=True)

        replace_files(Path(save_directory), write, CONFIG_NAME, *TENSOR_FILES)
        from .model_card import write_model_card

        write_model_card(save_directory)
        if push_to_hub:
            _push(save_directory, repo_id or Path(save_directory).resolve().name, **hub_options)

    def save_beside(self, folder: Path, **kwargs: Any) -> None:
        """Write what belongs to a checkpoint beside weights and configuration, into a folder that is then moved into
        the one of an `earlier` save."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """See [`hf_vs2.push_to_hub`]; same options, and those of `save_pretrained`."""
        return _push(self, repo_id, **options)


_push = push_to_hub  # for methods that have the same name
_HUB_OPTIONS = [name for name, option in signature(_push).parameters.items() if option.kind is option.KEYWORD_ONLY]


def _as_folder(path_or_model: Any, scratch: str, save_options: dict[str, Any]) -> CheckpointFolder:
    if isinstance(path_or_model, (str, os.PathLike)):
        if save_options:
            raise TypeError(f"{next(iter(save_options))}= is for saving a model; {path_or_model} is a folder.")
        return CheckpointFolder.open(path_or_model)
    if not isinstance(path_or_model, HubMixin):
        raise TypeError(
            f"push_to_hub takes a folder, an SAEModel or a VS2CLIPForZeroShot, not {type(path_or_model).__name__}."
        )
    path_or_model.save_pretrained(scratch, **save_options)
    return CheckpointFolder.open(scratch)


def _kind(folder: CheckpointFolder) -> str:
    if folder.model_type == VS2_TYPE:
        return "VS2 model"
    return f"{len(folder.configs)} SAEs" if folder.holds_several else "SAE"
