"""[`adapt`]: the steps, each of which takes up what an earlier run has finished."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPModel
from transformers.utils import CONFIG_NAME

from ..clip.classifier import zero_shot_classifier
from ..clip.modeling import VS2CLIPForZeroShot
from ..clip.pipeline import VS2ZeroShotImageClassificationPipeline
from ..config.sae import SAEConfig
from ..data.labels.lists import names_in
from ..data.labels.names import clean_class_names
from ..data.labels.prompts import check_prompts, class_embeddings, resolve_templates
from ..data.pixels import reading_fast
from ..data.stores.activations import ActivationStore, extract_activations
from ..data.stores.rows import rows_of
from ..encoders.families import is_steerable, refuse_without_texts
from ..encoders.processing import PROCESSOR_FILES
from ..encoders.tail import is_sigmoid, plain_embeds, temperature
from ..encoders.vision_tower import best_device
from ..evaluation.few_shot import cross_answers
from ..evaluation.recommendation import apply_method, candidates_of, recommend
from ..files.atomic import replace_text
from ..files.checkpoint_folder import shown_name
from ..files.digests import file_digest, json_digest
from ..files.json_files import read_json, write_json
from ..methods import METHODS
from ..training.arguments import SAETrainingArguments
from ..training.trainer import SAETrainer
from ..version import __version__
from .answers import compare
from .checked import checked_labels, write_to_label
from .images import dataset_of, image_names
from .names import LABELS_NAME, PAGE_NAME, REPORT_NAME, TO_LABEL_NAME
from .page import write_page
from .plan import sae_plan, trust
from .report import report_of


if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 5
# Images between two points from which an interrupted extraction goes on.
_SHARD = 1024


def adapt(
    clip: str | os.PathLike | CLIPModel,
    images: str | os.PathLike | Sequence[Any] | Dataset,
    labels: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    templates: str | Path | Sequence[str] = "single",
    checked: str | os.PathLike | None = None,
    image_column: str = "image",
    tokenizer: Any = None,
    image_processor: Any = None,
    revision: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    dtype: str = "float32",
    model_dtype: str = "auto",
    fast_decode: bool = False,
    on_error: str = "raise",
    seed: int = 42,
    clean: bool = True,
    overwrite_output_dir: bool = False,
    progress: bool = True,
    source: str | None = None,
    command: str | None = None,
) -> VS2ZeroShotImageClassificationPipeline:
    """
    A zero-shot classifier for your images and labels, better than plain CLIP where unlabelled images show a way to it,
    and plain CLIP where they don't; with a report of what was chosen, why, and what it changes.

    Five steps: CLIP reads the images (once, kept on disk), an SAE is trained on what it saw (see [`sae_plan`] and
    [`trust`] for its size and when it counts), a method is chosen (see [`recommend`]), its answers are compared with
    plain CLIP's, and the report is written. A second run with the same arguments repeats nothing, and one that was
    interrupted resumes.

    Args:
        clip: Hub id or path of a CLIP, or a loaded one.
        images: a folder, or anything else that [`load_images`] opens; a list of images; or a data set. Labels that it
            may have are not looked at.
        labels (`list[str]`): to choose from, two or more.
        output_dir: for the checkpoint, `report.html`, `report.json`, `to_label.csv` (100 images to label, drawn at
            random) and `labels.json`.
        templates: prompts, anything [`resolve_templates`] takes.
        checked (*optional*): a table with the columns `file` and `label`, such as `to_label.csv` filled in: all
            methods are compared on these images, and a paired test decides.
        image_column: of a data set.
        tokenizer, image_processor (*optional*): by default those of the CLIP.
        revision (*optional*): of a CLIP on the Hub.
        batch_size: images per forward pass. num_workers: as [`extract_activations`]. dtype: of the
            activations on disk. model_dtype: in which a CLIP given by name runs, "auto" as its file has it.
        fast_decode: as [`extract_activations`]; the checkpoint remembers it with its image processor.
        on_error: `"skip"` leaves out images that can't be read.
        seed: of the training and of the draw of images to label.
        clean: read labels by [`clean_class_names`] before they go into prompts.
        overwrite_output_dir: replace what an adaptation to other images left in `output_dir`.
        progress: show which step is at work, and bars.
        source (*optional*): what the report calls the images.
        command (*optional*): the command that repeats this, for the report's next step.

    Returns:
        The pipeline, with these labels and templates: `adapt(...)("photo.jpg")`.

    Raises:
        ValueError, TypeError, OSError: on labels, images or a CLIP that can't be used, and on an `output_dir` that
            holds something else; before any image is read where that can be told.
    """
    folder = Path(output_dir)
    labels = names_in(labels, "labels")
    if len(clean_class_names(labels, clean, "labels")) < 2:
        raise ValueError(f"There is one label, {labels[0]!r}, and so one answer: give two or more to choose from.")
    templates = resolve_templates(templates)
    if checked is not None and not Path(checked).expanduser().is_file():
        raise FileNotFoundError(f"There is no file of checked labels {os.fspath(checked)}.")
    say = _Steps(progress)
    dataset, called = dataset_of(images, image_column, on_error)
    where = source or (os.fspath(images) if isinstance(images, (str, os.PathLike)) else "")
    names = image_names(dataset, image_column, where)
    truth = None if checked is None else checked_labels(checked, names, labels)

    say(1, f"CLIP reads {len(dataset):,} images")
    plain = _plain(clip, tokenizer, image_processor, revision, model_dtype)
    check_prompts(plain.model, plain.tokenizer, labels, templates, clean)
    if fast_decode:
        plain.image_processor = reading_fast(plain.image_processor)
    store = extract_activations(
        plain.model,
        dataset,
        folder / "activations",
        image_column=image_column,
        image_processor=plain.image_processor,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
        on_error=on_error,
        shard_size=_SHARD,
        progress=progress,
        dataset_id=where or called,
    )
    names = [names[index] for index in store.image_indices.tolist()]
    if truth is not None:
        truth = truth[store.image_indices]

    say(2, "training a sparse autoencoder on them")
    sae, metrics, plan = _train(store, folder, seed, overwrite_output_dir, progress)
    trusted, why = trust(len(store), metrics)

    request = {
        "version": __version__,
        "images": store.path.name,
        "labels": labels,
        "templates": list(templates),
        "clean": clean,
        "seed": seed,
        "checked": None if checked is None else file_digest(Path(checked).expanduser()),
    }
    digest = json_digest(request)
    if _is_done(folder, digest):
        say(STEPS, f"nothing to do: {folder / PAGE_NAME} is of these images, labels and settings")
        return _pipeline(folder, plain, labels, templates, clean)

    say(3, "choosing a method" + ("" if checked is None else " by the checked labels"))
    classes = class_embeddings(plain.model, plain.tokenizer, labels, templates, clean=clean)
    model = VS2CLIPForZeroShot(plain.model, sae).eval()
    methods = [
        name for name in candidates_of(None, is_sigmoid(plain.model)) if trusted or not METHODS[name].reads_latents
    ]
    found = recommend(model, store, classes, truth, methods=methods, own_images=True, seed=seed)
    replace_text(folder / PROCESSOR_FILES[0], plain.image_processor.to_json_string())  # as these rows were read
    apply_method(model, found.method, folder)

    say(4, "comparing its answers with plain CLIP's")
    adapted = _pipeline(folder, plain, labels, templates, clean)
    answers = compare(adapted.model, rows_of(store), classes)

    say(5, "writing the report")
    write_json(folder / LABELS_NAME, labels)
    again = command or _command(clip, where, folder)
    report = report_of(
        request | {"digest": digest, "checkpoint": file_digest(folder / CONFIG_NAME)},
        found=found,
        few_shot=_few_shot(plain.model, store, truth, classes),
        sae={
            **metrics,
            "trusted": trusted,
            "why": why,
            "top_k": plan.top_k,
            "num_latents": sae.config.weight_shape[0],
        },
        answers=answers,
        truth=truth,
        names=names,
        images={
            "source": shown_name(where or called),
            "number": len(store),
            "skipped": len(store.metadata["skipped"]),
        },
        clip=shown_name(sae.config.base_model_name_or_path or "a CLIP"),
        folder=folder,
        again=again,
    )
    write_to_label(folder / TO_LABEL_NAME, names, labels, answers, seed)
    write_page(folder / PAGE_NAME, report, dataset, image_column, store.image_indices.tolist())
    write_json(folder / REPORT_NAME, report)  # last: with it the run is done
    return adapted


class _Steps:
    """Which step is at work, on stderr."""

    def __init__(self, shown: bool):
        self.shown = shown

    def __call__(self, number: int, what: str) -> None:
        if self.shown:
            print(f"Step {number} of {STEPS}: {what}", file=sys.stderr, flush=True)


def _plain(clip: Any, tokenizer: Any, image_processor: Any, revision: str | None, dtype: str) -> Any:
    """Plain CLIP's pipeline. A path is made absolute, since the checkpoint that names it is used from elsewhere."""
    options: dict[str, Any] = {"tokenizer": tokenizer, "image_processor": image_processor}
    if isinstance(clip, (str, os.PathLike)):
        clip = os.path.abspath(clip) if os.path.exists(clip) else os.fspath(clip)
        options |= {"device": best_device(), "dtype": dtype} | ({} if revision is None else {"revision": revision})
    elif revision is not None or dtype != "auto":
        raise ValueError("revision= and model_dtype= are for a CLIP given by name; this one is already loaded.")
    plain = zero_shot_classifier(clip, **options)
    if not is_steerable(plain.model):
        raise ValueError(f"{clip} is a checkpoint of hf_vs2: adapt starts from a plain CLIP. Give that one's name.")
    if not isinstance(plain.tokenizer, Mapping):
        refuse_without_texts(plain.model)
    return plain


def _pipeline(
    folder: Path, plain: Any, labels: Sequence[str], templates: Sequence[str], clean: bool
) -> VS2ZeroShotImageClassificationPipeline:
    """The checkpoint as everybody will load it, around the CLIP that is loaded."""
    model = VS2CLIPForZeroShot.from_pretrained(folder, clip=plain.model).eval()
    return zero_shot_classifier(
        model.to(plain.model.device),
        tokenizer=plain.tokenizer,
        image_processor=plain.image_processor,
        candidate_labels=labels,
        templates=list(templates),
        clean=clean,
    )


def _train(
    store: ActivationStore, folder: Path, seed: int, overwrite: bool, progress: bool
) -> tuple[Any, dict[str, Any], Any]:
    """The SAE, what its training measured, and its plan; from the folder where it is finished."""
    plan = sae_plan(len(store), store.hidden_size)
    config = SAEConfig(hidden_size=store.hidden_size, expansion_factor=plan.expansion_factor, top_k=plan.top_k)
    arguments = SAETrainingArguments(
        output_dir=str(folder),
        max_steps=plan.max_steps,
        seed=seed,
        overwrite_output_dir=overwrite,
        disable_tqdm=not progress,
    )
    with _quiet("hf_vs2.training"):  # what it warns of, the report says in its own words
        trainer = SAETrainer(config, arguments, store)
        metrics = trainer.train()
    return trainer.model.eval(), metrics, plan


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _few_shot(
    clip: CLIPModel, store: ActivationStore, truth: torch.Tensor | None, classes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What learning from the checked labels gives; nothing where there are fewer than two a label."""
    if truth is None or int((truth >= 0).sum()) < 2 * len(classes):
        return {}
    known = (truth >= 0).nonzero().squeeze(-1)
    rows = rows_of(store)
    with torch.no_grad():
        embeds = torch.cat([plain_embeds(clip, block).cpu() for block in rows.batches(indices=known)])
    return cross_answers(embeds, truth[known], classes.cpu(), temperature(clip).item())


def _is_done(folder: Path, digest: str) -> bool:
    """Whether the report is of this request and of the checkpoint as it is: a run over it that was killed, or a new
    training, leaves another method in the checkpoint."""
    try:
        asked = read_json(folder / REPORT_NAME)["request"]
        is_of_checkpoint = asked["checkpoint"] == file_digest(folder / CONFIG_NAME)
        return asked["digest"] == digest and is_of_checkpoint and (folder / PAGE_NAME).is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _command(clip: Any, images: str, folder: Path) -> str:
    """The command that repeats an adaptation made from Python, as far as it can be told."""
    model = clip if isinstance(clip, (str, os.PathLike)) else clip.config._name_or_path or "MODEL"
    words = ["hf-vs2", "adapt", "--model", os.fspath(model), "--dataset", images or "IMAGES"]
    return shlex.join([*words, "--labels", str(folder / LABELS_NAME), "--output_dir", str(folder)])
