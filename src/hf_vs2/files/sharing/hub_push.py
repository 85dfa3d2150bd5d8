"""One push of one checkpoint folder: what the Hub holds, what it should hold, and the commit between them."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import CONFIG_NAME, logging

from ...version import __version__
from ..checkpoint_folder import (
    CARD_NAME,
    CORPUS_FILES,
    LABEL_SETS_NAME,
    RESULTS_NAME,
    STATISTICS_NAME,
    TENSOR_FILES,
    CheckpointFolder,
    local_paths,
)
from ..json_files import as_bytes, from_json, read_json
from ..place import check_token
from ..weight_files import is_of_http, shapes_in
from .card_edits import card_to_upload, license_of
from .card_results import ResultFacts
from .model_card import create_model_card, read_card
from .shim import SHIM, SHIM_NAME, auto_map


logger = logging.get_logger(__name__)

LEADERBOARD_NAME = ".eval_results/hf_vs2.yaml"
_ATTEMPTS = 3
# Somebody else has committed; or a failing server, whose answer to a commit the client takes as final. (It may have
# made the commit all the same: the next attempt then finds nothing left to change.)
_WORTH_ANOTHER = (412, 500, 502, 503, 504)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass
class Push:
    """What [`hf_vs2.push_to_hub`] does; the arguments are explained there."""

    folder: CheckpointFolder
    repo_id: str
    _: KW_ONLY
    results: ResultFacts | None
    license: str | None
    tags: tuple[str, ...]
    private: bool | None
    create_pr: bool
    revision: str | None
    tag: str | None
    token: str | bool | None

    @cached_property
    def api(self) -> HfApi:
        return HfApi(token=self.token, library_name="hf_vs2", library_version=__version__)

    def run(self, message: str, description: str | None) -> CommitInfo:
        """Make the repository, the branch, the commit and the tag, each only if it is not there."""
        check_token(self.token)
        self._warn_about_paths()
        self._warn_about_rows()
        try:
            self._open_repository()
            tagged = self._open_revision()
            commit = self._commit(message, description)
            self._set_tag(commit, tagged)
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                error.append_to_message(
                    f"\nTo write to {self.repo_id}, log in (`hf auth login`) or give token=, with a token that may "
                    "write there."
                )
            raise
        except Exception as error:
            if not is_of_http(error):
                raise
            raise ConnectionError(
                f"{self.api.endpoint} could not be reached, or the connection broke ({error}). Push again: what has "
                "arrived is not sent twice."
            ) from error
        return commit

    # Before the commit

    def _warn_about_paths(self) -> None:
        corpus = self.folder.files.get(CORPUS_FILES[0])
        found = local_paths(
            [
                list(self.folder.configs.values()),
                from_json(self.results.content.decode()) if self.results else None,
                read_json(corpus) if corpus else None,
            ]
        )
        if found:
            logger.warning(
                f"{self.repo_id} will name places on this machine, which everybody who reads it sees and nobody else "
                f"can use: {', '.join(sorted(set(found)))}. If one of them is the CLIP, others must give their own "
                "(clip=...): better set config.base_model_name_or_path to its Hub id before saving."
            )

    def _warn_about_rows(self) -> None:
        for path in (path for name, path in self.folder.files.items() if name.endswith(STATISTICS_NAME)):
            rows = shapes_in(path).get("rows")
            if rows is not None:
                logger.warning(
                    f"{self.repo_id} will hold activations of {rows[0]:,} of the unlabelled images "
                    f"({STATISTICS_NAME}), for methods that fit prototypes to labels. To keep them to yourself, "
                    "calibrate with --sketch_rows 0 before."
                )

    def _open_repository(self) -> None:
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.private and not self.api.model_info(self.repo_id).private:
            raise ValueError(
                f"{self.repo_id} exists and is public, so private=True can't be kept; nothing was uploaded. Make it "
                "private in its settings first, or choose another name."
            )

    def _open_revision(self) -> str | None:
        """Make the branch if it is missing. Returns the commit that already has the tag we are to set."""
        branch = None if self.revision is None or self.revision.startswith("refs/") else self.revision
        if branch is None and self.tag is None:
            return None
        refs = self.api.list_repo_refs(self.repo_id)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if branch is not None and (branch in tags or _COMMIT.fullmatch(branch)):
            kind = "tag" if branch in tags else "commit"
            raise ValueError(f"revision={branch!r} is a {kind} of {self.repo_id}: give the branch to push to.")
        if branch is not None and branch not in {ref.name for ref in refs.branches}:
            self.api.create_branch(self.repo_id, branch=branch, exist_ok=True)
        tagged = tags.get(self.tag) if self.tag else None
        if tagged is not None and tagged != self.api.model_info(self.repo_id, revision=self.revision).sha:
            raise ValueError(f"{self._tag_message(tagged)} Nothing was uploaded.")
        return tagged

    # The commit

    def _commit(self, message: str, description: str | None) -> CommitInfo:
        for attempt in range(1, _ATTEMPTS + 1):
            head = self._state(self.revision)
            content, stale = self._content(head)
            proposed = self._proposed(content, message) if self.create_pr else None
            if proposed is not None:
                return proposed
            operations = [CommitOperationAdd(name, file) for name, file in content.items()]
            try:
                return self.api.create_commit(
                    self.repo_id,
                    operations=operations + [CommitOperationDelete(name) for name in stale],
                    commit_message=message,
                    commit_description=description,
                    create_pr=self.create_pr,
                    revision=self.revision,
                    # Refused if somebody has changed anything since the card was read: an edit of theirs can't get
                    # lost.
                    parent_commit=head.sha,
                )
            except HfHubHTTPError as error:
                if _status(error) not in _WORTH_ANOTHER or attempt == _ATTEMPTS:
                    raise
                reason = "has changed in the meantime" if _status(error) == 412 else f"answered {_status(error)}"
                logger.warning(f"{self.repo_id} {reason}: attempt {attempt + 1} of {_ATTEMPTS}.")
                time.sleep(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _state(self, revision: str | None) -> ModelInfo:
        return self.api.model_info(self.repo_id, revision=revision, files_metadata=True)

    def _content(self, head: ModelInfo) -> tuple[dict[str, Path | bytes], list[str]]:
        """What the repository should hold on top of `head`, by path, and which files are to go."""
        on_hub = _files_of(head)
        results = self.results
        if results is None and RESULTS_NAME in on_hub and self._has_same_weights(on_hub):
            results = ResultFacts.from_file(self._download(head, RESULTS_NAME))
        content: dict[str, Path | bytes] = {**self.folder.files, **self._configs(), SHIM_NAME: SHIM.encode()}
        content[CARD_NAME] = self._card(head, results).encode()
        if results is not None:
            content[RESULTS_NAME] = results.content
            if results.leaderboard_entry is not None:
                content[LEADERBOARD_NAME] = results.leaderboard_entry.encode()
        # Figures of other weights; weights, a corpus, statistics and label sets that the checkpoint no longer has.
        patterns = [RESULTS_NAME, LEADERBOARD_NAME]
        patterns += [f"{name}/{file}".lstrip("/") for name in self.folder.configs for file in TENSOR_FILES]
        stale = {name for name in on_hub for pattern in patterns if _is_at(name, pattern)}
        return content, sorted(stale - content.keys())

    def _card(self, head: ModelInfo, results: ResultFacts | None) -> str:
        path = self.folder.path / CARD_NAME
        local = read_card(path)
        remote = read_card(self._download(head, CARD_NAME)) if CARD_NAME in _files_of(head) else None
        # A licence given once need not be given again.
        license = self.license or license_of(local) or license_of(remote)
        ours = create_model_card(self.folder, name=self.repo_id, results=results, license=license, tags=self.tags)
        card, stands_back = card_to_upload(str(ours), local, remote)
        if stands_back:
            logger.warning(
                f"{CARD_NAME} was edited on the Hub, so {path} was not uploaded. To put yours in its place: "
                f"hf upload {self.repo_id} {path} {CARD_NAME}"
            )
        return card

    def _configs(self) -> dict[str, bytes]:
        """Each `config.json`, with the entries that lead `trust_remote_code=True` to the shim."""
        classes = auto_map(self.folder.model_type)
        return {
            f"{folder}/{CONFIG_NAME}".lstrip("/"): as_bytes(config | {"auto_map": classes}, indent=2, sort_keys=True)
            for folder, config in self.folder.configs.items()
        }

    def _has_same_weights(self, on_hub: dict[str, set[str]]) -> bool:
        beside = (STATISTICS_NAME, LABEL_SETS_NAME)  # figures do not become another model's when a label set is fitted
        files = self.folder.files.items()
        weights = {name: path for name, path in files if path.suffix == ".safetensors" and path.name not in beside}
        return all(_is_there(on_hub, name, path) for name, path in weights.items())

    def _proposed(self, content: dict[str, Path | bytes], message: str) -> CommitInfo | None:
        """An open pull request that proposes just this."""
        requests = self.api.get_repo_discussions(
            self.repo_id, discussion_type="pull_request", discussion_status="open"
        )
        for request in (request for request in requests if request.title == message):
            state = self._state(request.git_reference)
            on_hub = _files_of(state)
            if state.sha and all(_is_there(on_hub, name, file) for name, file in content.items()):
                logger.warning(f"{request.url} proposes the same already.")
                url = f"{self.api.endpoint}/{self.repo_id}/commit/{state.sha}"
                return CommitInfo(url, message, "", state.sha, _endpoint=self.api.endpoint, pr_url=request.url)
        return None

    def _download(self, head: ModelInfo, name: str) -> Path:
        return Path(self.api.hf_hub_download(self.repo_id, name, revision=head.sha))

    # After it

    def _set_tag(self, commit: CommitInfo, tagged: str | None) -> None:
        if self.tag is None or tagged == commit.oid:
            return
        if tagged is not None:
            raise ValueError(f"{self._tag_message(tagged)} The new commit is {commit.commit_url}, without the tag.")
        self.api.create_tag(self.repo_id, tag=self.tag, revision=commit.oid)

    def _tag_message(self, tagged: str) -> str:
        return (
            f"tag={self.tag!r} already marks commit {tagged} of {self.repo_id}. Choose another, or delete that one "
            "first."
        )


def _status(error: HfHubHTTPError) -> int | None:
    return None if error.response is None else error.response.status_code


def _files_of(state: ModelInfo) -> dict[str, set[str]]:
    """Path -> the digests that stand for its content: git's, and for a large file its SHA-256."""
    return {
        file.rfilename: {digest for digest in (file.blob_id, file.lfs.sha256 if file.lfs else None) if digest}
        for file in state.siblings or []
    }


def _is_at(name: str, pattern: str) -> bool:
    """Whether a path in the repository matches a pattern, in which a star stands for no "/"."""
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def _is_there(on_hub: dict[str, set[str]], name: str, content: Path | bytes) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    git_digest = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return bool(on_hub.get(name, set()) & {git_digest, hashlib.sha256(data).hexdigest()})
