"""Steps that several commands share, from the values of their flags to data sets, models and rows."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import steering_flags
from .parsing import Parser, UsageError
from .places import check_writable


if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

    from ..clip.modeling import VS2CLIPForZeroShot
    from ..clip.pipeline import VS2ZeroShotImageClassificationPipeline
    from ..data.labels.lists import Names
    from ..data.stores.activations import ActivationStore


def local_or_id(name: str) -> str:
    """A Hub id as it is; a path made absolute, because checkpoints and stores that name it are used from elsewhere."""
    return os.path.abspath(name) if os.path.exists(name) else name


def join_processes() -> PartialState:
    """This process among those of a launch (`accelerate launch`, torchrun), and its device."""
    import torch
    from accelerate import PartialState

    # Left to itself, accelerate joins processes without a GPU only where an environment variable tells it to.
    return PartialState(cpu=not torch.accelerator.is_available())


def open_dataset(args: argparse.Namespace) -> Any:
    """The data set that the flags describe. Processes of one launch may do so at once: `datasets` locks its cache."""
    import datasets

    from ..data.load import load_images

    if args.disable_tqdm or not join_processes().is_main_process:
        datasets.disable_progress_bars()
    return load_images(args.dataset, args.split, **opening(args))


def opening(args: argparse.Namespace) -> dict[str, Any]:
    """How the flags say that a data set is opened."""
    return {
        "image_column": args.image_column,
        "config_name": args.dataset_config,
        "revision": args.dataset_revision,
        "streaming": args.streaming,
        "label_column": getattr(args, "label_column", None),
        "on_error": args.on_error,
    }


def extract(args: argparse.Namespace, model: Any, dataset: Any, output_dir: Path, **options: Any) -> ActivationStore:
    """`extract_activations` with the flags of `flags.add_extraction`. Several processes share the work."""
    from ..data.stores.activations import extract_activations

    return extract_activations(model, dataset, output_dir, dataset_id=args.dataset, **reading(args), **options)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """How the flags say that images are read."""
    names = ("image_column", "batch_size", "num_workers", "dtype", "on_error")
    return {name: getattr(args, name) for name in names} | {"progress": not args.disable_tqdm}


def open_rows(
    args: argparse.Namespace,
    model: VS2CLIPForZeroShot,
    image_processor: Any,
    *,
    tokenizer: Any = None,
    all_labelled: bool = False,
    **options: Any,
) -> tuple[Names | None, ActivationStore]:
    """The labels that the flags give for their data set (with a tokenizer, it must have some, that this CLIP tells
    apart; with `all_labelled`, each image one of them), and its rows, in the cache of [`activations_beside`] from then
    on."""
    from ..data.labels.names import check_labelled

    dataset = open_dataset(args)
    if all_labelled:
        check_labelled(dataset, args.label_column)
    labels = None if tokenizer is None else labels_from(args, dataset, model, tokenizer, required=True)
    options = {"label_column": getattr(args, "label_column", None), "image_processor": image_processor} | options
    return labels, extract(args, model.clip, dataset, activations_beside(args), **options)


def check_places(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse places that this command can't write to, before it reads anything."""
    for name, (flag, kind) in parser.writes.items():
        if getattr(args, name) is not None:
            check_writable(getattr(args, name), flag, kind == "folder")
    if "activations_dir" in parser.writes and args.activations_dir is None and os.path.isdir(args.checkpoint):
        check_writable(activations_beside(args), "--activations_dir")


def activations_beside(args: argparse.Namespace) -> Path:
    """Where the activations that go with a checkpoint are cached: in its folder, or in the Hub's cache."""
    if args.activations_dir is not None:
        return args.activations_dir
    if os.path.isdir(args.checkpoint):
        return Path(args.checkpoint) / "activations"
    from huggingface_hub import cached_assets_path

    return cached_assets_path("hf_vs2", subfolder="activations")


def checkpoint_place(args: argparse.Namespace) -> dict[str, str]:
    """`revision` and `subfolder` of `flags.add_checkpoint`, where they were given."""
    return {name: getattr(args, name) for name in ("revision", "subfolder") if getattr(args, name) is not None}


def load_classifier(args: argparse.Namespace) -> VS2ZeroShotImageClassificationPipeline:
    """The model of `flags.add_checkpoint` with its tokenizer and image processor, on the best device there is."""
    from ..clip.classifier import zero_shot_classifier

    options: dict[str, Any] = checkpoint_place(args)
    if args.clip is not None:
        options["clip"] = local_or_id(args.clip)
    classifier = zero_shot_classifier(args.checkpoint, device=join_processes().device, **options)
    dtype = getattr(args, "model_dtype", "auto")
    if dtype != "auto":
        import torch

        classifier.clip.to(getattr(torch, dtype))
    if getattr(args, "fast_decode", False):
        from ..data.pixels import reading_fast

        classifier.image_processor = reading_fast(classifier.image_processor)
    return classifier


def load_steered_clip(
    args: argparse.Namespace, texts: bool = True
) -> tuple[VS2CLIPForZeroShot, PreTrainedTokenizerBase, Any]:
    """The same in parts: model, tokenizer (`None` of a model without texts), image processor.

    Raises:
        ValueError: the checkpoint is a plain CLIP, or without the `texts` that the command needs.
    """
    from ..clip.modeling import VS2CLIPForZeroShot
    from ..encoders.families import refuse_without_texts

    classifier = load_classifier(args)
    if not isinstance(classifier.model, VS2CLIPForZeroShot):
        raise ValueError(f"{args.checkpoint} is a plain CLIP without SAE: train one on it with hf-vs2 train")
    if texts:
        refuse_without_texts(classifier.clip)
    return classifier.model.eval(), classifier.tokenizer, classifier.image_processor


def steering_from(args: argparse.Namespace, method: bool = False) -> dict[str, Any]:
    """Settings from `flags.add_steering`; what was not given is left to the checkpoint."""
    settings = {name: getattr(args, name) for name in steering_flags(method) if getattr(args, name) is not None}
    return settings | {"gate": None} if settings.get("gate") == "none" else settings


def labels_and_prompts(args: argparse.Namespace) -> tuple[list[str], Any, bool]:
    """Labels, templates and whether labels are cleaned: as the command line says, or else as the checkpoint was
    adapted to."""
    from ..adaptation.in_use import asked_in
    from ..data.labels.lists import names_in
    from ..data.labels.prompts import resolve_templates

    asked: tuple[list[str], Any, bool] | None
    if args.labels is None:
        asked = asked_in(args.checkpoint, checkpoint_place(args))
    else:
        asked = names_in(labels_from(args) or []), "single", True
    if asked is None:
        raise UsageError(
            f"--labels is missing: {args.checkpoint} was not adapted to labels (hf-vs2 adapt), or was pushed, which "
            "leaves out its report.json with the labels and the names of your files"
        )
    labels, templates, clean = asked
    templates = templates if args.templates is None else args.templates
    resolve_templates(templates)
    return labels, templates, clean and not args.names_as_given


def labels_from(
    args: argparse.Namespace,
    dataset: Any = None,
    model: VS2CLIPForZeroShot | None = None,
    tokenizer: Any = None,
    required: bool = False,
) -> Names | None:
    """What `--labels` stands for. With the data set it is refused before anything long begins where it does not fit
    the classes of `--label_column`, and, if `required`, where neither has names; with a model and its tokenizer, where
    names are one to this CLIP, given or the data set's."""
    from transformers.utils import logging

    from ..data.labels.lists import names_in
    from ..data.labels.names import check_names, class_names_of, clean_class_names, read_labels
    from ..data.labels.prompts import check_prompts

    column = None if dataset is None else args.label_column
    own = None if column is None else class_names_of(dataset, column)
    labels = None if args.labels is None else read_labels(args.labels)
    if labels is not None:
        clean_class_names(names_in(labels), not args.names_as_given, "--labels")
        matched = None if column is None else check_names(dataset, column, labels)
        if matched is not None and logging.get_verbosity() > logging.WARNING:  # which the evaluation's warning tells
            print(matched, file=sys.stderr)
    elif required and own is None and column in (dataset.features or {}):
        raise UsageError(f"column {column!r} has no class names: give them in label order with --labels")
    names = own if labels is None else names_in(labels)
    if model is not None and tokenizer is not None and names:
        for templates in [args.templates] if isinstance(args.templates, str) else args.templates:
            check_prompts(model.clip, tokenizer, names, templates, not args.names_as_given)
    return labels
