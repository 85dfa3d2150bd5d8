"""The unlabelled corpus of VS2++ (arXiv 2506.01247, sections 3.3 and 4.2): kept on disk, and asked for neighbours.

A saved corpus is `corpus.safetensors` (`rows`, and `embeddings` where another encoder finds the neighbours) and
`corpus.json`, which says what they were made from. No label is stored: pseudo-labels are CLIP's guesses among the
classes of the call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel
from transformers.utils import cached_file

from ..config.sae import holds_samples
from ..config.schema import one_of
from ..data.stores.rows import rows_of
from ..encoders.base_model import describe_base_model, warn_of_relative
from ..encoders.families import tower_of
from ..encoders.fingerprints import same_fingerprint, vision_fingerprint
from ..files.atomic import replace_files
from ..files.checkpoint_folder import CORPUS_CONFIG_NAME, CORPUS_ROWS_NAME
from ..files.digests import check_digest, file_digest
from ..files.json_files import read_format, write_json
from ..files.place import at_one_commit
from ..files.weight_files import LARGEST, read_tensors, write_tensors
from ..functional.neighbors import BLOCK_ROWS, unit_rows


FORMAT = "hf_vs2.corpus"
FORMAT_VERSION = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BASE = ("name_or_path", "revision", "fingerprint", "weights")
"""What is recorded of the CLIP, with `base_model_` before it."""


@dataclass(frozen=True, eq=False)
class RetrievalCorpus:
    """
    CLS rows of unlabelled images, the neighbours of VS2++ are taken from.

    Args:
        rows (`torch.Tensor` of shape `(n, hidden_size)`): of the CLIP's last layer, before `post_layernorm`; float32
            or bfloat16. Latents and CLIP embeddings are computed from them.
        embeddings (`torch.Tensor` of shape `(n, d)`, *optional*): of the same images by another encoder, in whose
            space neighbours are looked for. Without it that is the CLIP's own.
        encoder (`str`, *optional*), encoder_revision (`str`, *optional*): that encoder.
        base_model_name_or_path (`str`, *optional*), base_model_revision (`str`, *optional*), base_model_fingerprint
            (`list[float]`, *optional*), base_model_weights (`dict[str, str]`, *optional*): the CLIP, as an
            [`SAEConfig`] records it.
        checked (`bool`, *optional*, defaults to `False`): that the numbers are known to be finite; it is not kept.

    Raises:
        `ValueError`: on shapes that do not fit, other dtypes, or rows with NaN or infinity.
    """

    rows: torch.Tensor
    embeddings: torch.Tensor | None = None
    encoder: str | None = None
    encoder_revision: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_fingerprint: list[float] | None = None
    base_model_weights: dict[str, str] | None = None
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        for name, tensor in self._tensors().items():
            if tensor.ndim != 2 or tensor.dtype not in _DTYPES.values() or not tensor.numel():
                raise ValueError(
                    f"The {name} of a corpus are a matrix with a row an image, float32 or bfloat16; these are "
                    f"{tuple(tensor.shape)}, {tensor.dtype}."
                )
            for start in range(0, 0 if checked else len(tensor), BLOCK_ROWS):
                usable = tensor[start : start + BLOCK_ROWS].abs().amax(-1) <= LARGEST  # not with NaN
                if not usable.all():
                    row = start + int((~usable).nonzero()[0])
                    raise ValueError(
                        f"Row {row} of the corpus' {name} holds NaN, infinity or a number beyond {LARGEST:g}: leave "
                        "that image out."
                    )
        if (self.embeddings is None) != (self.encoder is None):
            raise ValueError(
                "embeddings= and encoder= go together: the embeddings, and the id of the model that made them."
            )
        if self.embeddings is not None and len(self.embeddings) != len(self.rows):
            raise ValueError(
                f"{len(self.embeddings)} embeddings for {len(self.rows)} rows: they must be of the same images, in "
                "one order."
            )

    @classmethod
    def from_store(
        cls,
        store_or_rows: Any,
        *,
        clip: CLIPModel | None = None,
        embeddings: torch.Tensor | None = None,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        dtype: str = "float32",
    ) -> RetrievalCorpus:
        """
        A corpus from an activation store, or from CLS rows in memory.

        Args:
            store_or_rows ([`ActivationStore`] or `torch.Tensor` of shape `(n, hidden_size)`): with the last layer's
                rows.
            clip (`CLIPModel`, *optional*): the CLIP that made a tensor of rows; a store has it on record. Without it
                nothing tells later that the corpus belongs to another CLIP.
            embeddings, encoder, encoder_revision (*optional*): to look for neighbours in another encoder's space; see
                [`embed_images`].
            dtype (`str`): `"float32"`, or `"bfloat16"` to halve the corpus.

        Raises:
            `ValueError`: if the store lacks the last layer or is of another CLIP; and see the class.
        """
        one_of(tuple(_DTYPES)).read(dtype, "dtype")
        if isinstance(store_or_rows, torch.Tensor):
            rows = store_or_rows
            made_with: Mapping[str, Any] = {} if clip is None else describe_base_model(clip)
        else:
            rows, made_with = store_or_rows.tensor(-1), rows_of(store_or_rows, -1).origin
        base: dict[str, Any] = {name: made_with.get(name) for name in (f"base_model_{part}" for part in _BASE)}
        corpus = cls(
            rows.detach().cpu().to(_DTYPES[dtype]),
            None if embeddings is None else unit_rows(embeddings.detach().cpu()).to(_DTYPES[dtype]),
            encoder,
            encoder_revision,
            **base,
        )
        if clip is not None:
            corpus.check_base_model(clip)
        return corpus

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        space = "the CLIP's own space" if self.encoder is None else f"the space of {self.encoder}"
        return (
            f"RetrievalCorpus({len(self)} rows of {self.base_model_name_or_path or 'a CLIP without a name'}, searched "
            f"in {space})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RetrievalCorpus:
        return self  # never changed, and large

    def check_base_model(self, clip: CLIPModel) -> None:
        """Refuse a CLIP that these rows are not of, by a `ValueError` with both and the difference."""
        theirs = self.base_model_name_or_path or "a CLIP without a name"
        both = (
            f"This corpus was made with {theirs}; the CLIP given is "
            f"{clip.config._name_or_path or 'one without a name'}."
        )
        width = tower_of(clip).config.hidden_size
        if self.rows.shape[1] != width:
            raise ValueError(
                f"{both} Its rows have {self.rows.shape[1]} features, the vision tower gives {width}. Extract the "
                "images again with this CLIP."
            )
        recorded = self.base_model_fingerprint
        if recorded is not None and not same_fingerprint(vision_fingerprint(clip), recorded):
            raise ValueError(
                f"{both} They have the same shape but not the same weights. Extract the images again with this CLIP."
            )
        warn_of_relative(clip, self.base_model_weights, f"This corpus was made with {theirs}")

    # On disk

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `corpus.safetensors` and `corpus.json` into a folder, made when needed: both or none."""

        def write(scratch: Path) -> None:
            write_tensors(scratch / CORPUS_ROWS_NAME, self._tensors())
            description = self._description() | {"digest": file_digest(scratch / CORPUS_ROWS_NAME)}
            write_json(scratch / CORPUS_CONFIG_NAME, description, indent=2, sort_keys=True)

        replace_files(Path(save_directory).expanduser(), write, CORPUS_CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str = "",
        digest: str | None = None,
        **kwargs: Any,
    ) -> RetrievalCorpus:
        """
        Load a corpus from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or path): Hub id or folder.
            subfolder (`str`): `"corpus"` for the one in a VS2 checkpoint.
            digest (`str`, *optional*): of `corpus.safetensors`, where the checkpoint around the corpus has it too.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            `OSError`: if files are missing or can't be reached. `ValueError`: if they are something else, or damaged.
        """
        source = os.fspath(pretrained_model_name_or_path)
        place = at_one_commit(source, {"subfolder": subfolder, **kwargs}, CORPUS_CONFIG_NAME)
        description_path = cached_file(source, CORPUS_CONFIG_NAME, **place)
        description = _read_description(Path(description_path))
        rows_path = cached_file(source, CORPUS_ROWS_NAME, **place)
        digests = {digest, description.get("digest")} - {None}
        tensors, _ = read_tensors(rows_path)
        names = {"rows"} if description["encoder"] is None else {"rows", "embeddings"}
        if set(tensors) != names or len(tensors["rows"]) != description["num_rows"]:
            raise ValueError(
                f"{rows_path} and {CORPUS_CONFIG_NAME} beside it are not of one corpus (a save that was cut off?): "
                "save it again."
            )
        for known in digests:
            check_digest(rows_path, {CORPUS_ROWS_NAME: str(known)}, by=CORPUS_CONFIG_NAME)
        base, encoder = description["base_model"], description["encoder"] or {}
        try:
            return cls(
                tensors["rows"],
                tensors.get("embeddings"),
                encoder.get("name_or_path"),
                encoder.get("revision"),
                **{f"base_model_{name}": base.get(name) for name in _BASE},
                checked=bool(digests),
            )
        except ValueError as error:
            raise ValueError(f"{rows_path} can't be used. {error}") from error

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"rows": self.rows} | ({} if self.embeddings is None else {"embeddings": self.embeddings})

    def _description(self) -> dict[str, Any]:
        encoder = None
        if self.encoder is not None:
            encoder = {"name_or_path": self.encoder, "revision": self.encoder_revision}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_model": {name: getattr(self, f"base_model_{name}") for name in _BASE},
            "encoder": encoder,
            "num_rows": len(self),
        }


def _read_description(path: Path) -> dict[str, Any]:
    what, remedy = "the description of a corpus", "make the corpus again"
    description = read_format(path, (FORMAT, FORMAT_VERSION), what, remedy)
    base, encoder = description.get("base_model"), description.get("encoder", "")
    numbers, samples = (base.get(name) if isinstance(base, dict) else None for name in ("fingerprint", "weights"))
    fields = {
        "num_rows": isinstance(description.get("num_rows"), int),
        "base_model": isinstance(base, dict) and {"name_or_path", "revision", "fingerprint"} <= base.keys(),
        "digest": isinstance(description.get("digest", ""), str),
        "encoder": encoder is None or (isinstance(encoder, dict) and isinstance(encoder.get("name_or_path"), str)),
        "base_model.fingerprint": numbers is None
        or (isinstance(numbers, list) and all(isinstance(number, float) for number in numbers)),
        "base_model.weights": samples is None or holds_samples(samples),  # earlier versions wrote none
    }
    wrong = [name for name, right in fields.items() if not right]
    if wrong:
        raise ValueError(f"{path} does not describe a corpus: {wrong[0]} is missing or of the wrong type.")
    return description
