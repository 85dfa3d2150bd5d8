"""Flags and steps that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import LARGEST_BATCH, Kind, whole
from ..config.steering import QUANTILE, Steering
from .parsing import Parser, UsageError
from .places import check_writable


if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

    from ..clip.modeling import VS2CLIPForZeroShot
    from ..clip.pipeline import VS2ZeroShotImageClassificationPipeline
    from ..data.labels.lists import Names
    from ..data.stores.activations import ActivationStore


# Output


def say(*lines: str) -> None:
    """Print results, on the main process only. Letters that the terminal has not got are shown by number, as
    `\\xe9`."""
    if os.environ.get("RANK", "0") == "0":
        encoding = sys.stdout.encoding or "utf-8"
        print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def say_json(value: Any) -> None:
    """Print JSON. Where the terminal has not got a letter it is all ASCII, so that nothing is lost."""
    from ..files.json_files import to_json

    text = to_json(value, indent=1)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = to_json(value, indent=1, ensure_ascii=True)
    say(text)


def say_written(places: Mapping[str, Any]) -> None:
    """Print what was written, and where."""
    say("", "Written:", *(f"  {what:<15} {place}" for what, place in places.items()))


# Flags

BATCH = whole(1, LARGEST_BATCH)
LAYER = whole(-1000, 1000)
GATE = Kind("a quantile above 0 and below 1, or none", lambda value: value == "none" or QUANTILE.accepts(value))

TEMPLATES = "single, ensemble or a file of prompts (.txt, .csv, .json)."


def add_model_flags(parser: Parser, required: bool = True) -> None:
    parser.flag("--model", required=required, metavar="M", help="CLIP model: Hub id or folder.")
    parser.flag("--revision", help="Branch, tag or commit of a model on the Hub.")


def add_dataset_flags(parser: Parser, required: bool = True) -> None:
    parser.flag(
        "--dataset",
        required=required,
        metavar="D",
        help="Images: Hub id, folder of images or of parquet or .tar files, list of paths (.csv), saved data set.",
    )
    parser.flag(
        "--split", metavar="S", help='Such as train, test or "train[:600]"; may be left out where there is one.'
    )
    parser.flag("--image_column", default="image", metavar="NAME", help="Column of the images.")
    parser.flag("--dataset_config", metavar="NAME", help="Configuration of a data set on the Hub.")
    parser.flag("--dataset_revision", help="Branch, tag or commit of a data set on the Hub.")
    parser.flag("--streaming", action="store_true", help="Read the images one after another, without a copy on disk.")


def add_extraction_flags(parser: Parser, activations_dir: str | None = None) -> None:
    """`activations_dir`: help of that flag, for commands that cache activations beside their own output."""
    if activations_dir is not None:
        parser.flag("--activations_dir", type=Path, help=activations_dir, writes="folder")
    parser.flag("--batch_size", type=int, kind=BATCH, default=64, help="Images per forward pass of CLIP.")
    parser.flag(
        "--num_workers",
        type=int,
        kind=whole(0, 1024),
        help="Processes that decode and resize; 0: the main one does it, when a batch's turn comes "
        "[threads, as many as there are processors to have].",
    )
    parser.flag(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of the activations on disk."
    )
    parser.flag("--on_error", choices=("raise", "skip"), default="raise", help="What to do at an unreadable image.")


def add_speed_flags(parser: Parser) -> None:
    """What makes reading and computing faster at the price of slightly other numbers."""
    parser.flag(
        "--model_dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="Precision that CLIP runs in; SAE and steering stay in float32. auto: that of its file.",
    )
    parser.flag(
        "--fast_decode",
        action="store_true",
        help="Decode large JPEGs at a fraction of their size, and resize only what CLIP sees: slightly other pixels.",
    )


def add_checkpoint_flags(parser: Parser) -> None:
    parser.flag("--checkpoint", required=True, metavar="O", help="Folder or Hub id that `hf-vs2 train` wrote.")
    parser.flag("--clip", metavar="M", help="CLIP to use instead of the one that the checkpoint names.")
    parser.flag("--revision", help="Branch, tag or commit of a checkpoint on the Hub.")
    parser.flag("--subfolder", help="Folder of the checkpoint in its repository.")


def add_class_names_flag(parser: Parser) -> None:
    """What the labels of a data set are called in prompts."""
    parser.flag(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="Labels to choose from, matched by name with the data set's classes, or a file of them (.txt, .csv, "
        ".json) [the data set's].",
    )
    _add_names_as_given(parser)


REMEMBERED = "those that the checkpoint was adapted to"


def add_label_flags(parser: Parser, otherwise: str = "") -> None:
    """What an image may be, and how CLIP is asked; `otherwise`: where labels come from when none are given. With
    [`REMEMBERED`], prompts do too: read both by [`labels_and_prompts`]."""
    parser.flag(
        "--labels",
        nargs="+",
        required=not otherwise,
        metavar="NAME",
        help="Labels to choose from, or a file of them (.txt, .csv, .json)"
        + (f" [{otherwise}]." if otherwise else "."),
    )
    default = None if otherwise == REMEMBERED else "single"
    parser.flag("--templates", default=default, metavar="T", help=TEMPLATES)
    _add_names_as_given(parser)


def _add_names_as_given(parser: Parser) -> None:
    parser.flag(
        "--names_as_given",
        action="store_true",
        help="Put labels into prompts as they are; else `_` is read as a blank, and numbering such as 001. goes.",
    )


def add_steering_flags(parser: Parser, method: bool = False) -> None:
    """`method`: for commands that use one method, rather than compare several."""
    parser.section("steering (by default what the checkpoint says)")
    for name in _steering_flags(method):
        if name == "gate":
            text = Steering.__dataclass_fields__[name].metadata["help"]
            parser.flag("--gate", type=_gate, kind=GATE, metavar="Q", help=text)
        else:
            parser.dataclass_flags(Steering, [name], defaults=False)


def _steering_flags(method: bool) -> list[str]:
    return [*(["method"] if method else []), "gamma", "lambda_", "coefficient", "gate", "fvu_threshold"]


def add_progress_flag(parser: Parser) -> None:
    parser.flag("--disable_tqdm", action="store_true", help="No progress bar.")


def _gate(text: str) -> float | str:
    return text if text == "none" else float(text)


# Steps


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
    return load_images(
        args.dataset,
        args.split,
        image_column=args.image_column,
        config_name=args.dataset_config,
        revision=args.dataset_revision,
        streaming=args.streaming,
        label_column=getattr(args, "label_column", None),
        on_error=args.on_error,
    )


def extract(
    args: argparse.Namespace,
    model: Any,
    dataset: Any,
    output_dir: Path,
    *,
    layers: Sequence[int] = (-1,),
    **options: Any,
) -> ActivationStore:
    """`extract_activations` with the flags of [`add_extraction_flags`]. Several processes share the work."""
    from ..data.stores.activations import extract_activations

    return extract_activations(
        model,
        dataset,
        output_dir,
        layers=layers,
        image_column=args.image_column,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        dtype=args.dtype,
        on_error=args.on_error,
        progress=not args.disable_tqdm,
        dataset_id=args.dataset,
        **options,
    )


def open_rows(
    args: argparse.Namespace,
    model: VS2CLIPForZeroShot,
    image_processor: Any,
    *,
    tokenizer: Any = None,
    all_labelled: bool = False,
    **options: Any,
) -> tuple[Any, Names | None, ActivationStore]:
    """The data set of the flags, the labels that they give for it (with a tokenizer, it must have some, that this CLIP
    tells apart; with `all_labelled`, each image one of them), and its rows, in the cache of [`activations_beside`]
    from then on."""
    from ..data.labels.names import check_labelled

    dataset = open_dataset(args)
    if all_labelled:
        check_labelled(dataset, args.label_column)
    labels = None if tokenizer is None else labels_from(args, dataset, model, tokenizer, required=True)
    options = {"label_column": getattr(args, "label_column", None), "image_processor": image_processor} | options
    return dataset, labels, extract(args, model.clip, dataset, activations_beside(args), **options)


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
    """`revision` and `subfolder` of [`add_checkpoint_flags`], where they were given."""
    return {name: getattr(args, name) for name in ("revision", "subfolder") if getattr(args, name) is not None}


def load_classifier(args: argparse.Namespace) -> VS2ZeroShotImageClassificationPipeline:
    """The model of [`add_checkpoint_flags`] with its tokenizer and image processor, on the best device there is."""
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
    """Settings from [`add_steering_flags`]; what was not given is left to the checkpoint."""
    settings = {name: getattr(args, name) for name in _steering_flags(method) if getattr(args, name) is not None}
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
        raise UsageError(f"--labels is missing: {args.checkpoint} was not adapted to labels (hf-vs2 adapt)")
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
