"""`hf-vs2 atlas`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.schema import whole
from .. import flags, steps
from ..output import say, say_written
from ..parsing import Parser


if TYPE_CHECKING:
    from ...data.stores.activations import ActivationStore

USAGE = "--checkpoint O --dataset D [--split S] --output DIR [options]"
DESCRIPTION = """\
Writes a folder of static HTML in which a person browses the latents of an SAE: their strongest images, histograms,
classes, nearest latents and names, and an overview of training, gate, results and of the images that steering
fixed and broke. It opens from disk, without a server or a network. What lacks its input (labels, a training log,
results) is left out."""
EXAMPLES = """\
examples:
  hf-vs2 atlas --checkpoint outputs/sae-cifar100 --dataset uoft-cs/cifar100 --split test \\
      --image_column img --label_column fine_label --output atlas-cifar100
  hf-vs2 atlas --checkpoint outputs/sae --dataset photos/ --vocabulary words.txt --output atlas

Open DIR/index.html in a browser; DIR/latents.json holds the same for programs."""


def add_flags(parser: Parser) -> None:
    parser.section("what to show")
    flags.add_checkpoint(parser)
    parser.flag(
        "--vocabulary",
        type=Path,
        metavar="FILE",
        help="Words to name latents with, one a line [2,900 common words and the classes].",
    )
    parser.flag(
        "--results",
        type=Path,
        metavar="JSON",
        help="What `hf-vs2 evaluate` wrote [CHECKPOINT/results.json, if there].",
    )
    parser.flag("--top_images", kind=whole(1, 1000), default=24, help="Images of each latent.")
    parser.section("images")
    flags.add_dataset(parser)
    flags.add_label_column(parser, " [label, if there].")
    flags.add_labels(parser, "the data set's", of_classes=True)
    flags.add_steering(parser)
    parser.section("output")
    parser.flag(
        "--output",
        writes="folder",
        required=True,
        metavar="DIR",
        help="Folder to write; an earlier atlas is replaced.",
    )
    flags.add_progress(parser)
    parser.section("extraction of activations")
    parser.flag(
        "--activations", type=Path, metavar="STORE", help="Activations of these images that are there already."
    )
    flags.add_extraction(parser, beside_checkpoint=True)


keeps = steps.activations_beside


def run(args: Namespace) -> None:
    from ...atlas import build_atlas
    from ...atlas.material import training_curves
    from ...atlas.writing import check_output
    from ...data.labels.prompts import resolve_templates
    from ...explain.latent_names import read_vocabulary
    from ...files.checkpoint_folder import RESULTS_NAME, TRAINING_LOG_NAME
    from ...files.report import EvaluationResult

    # Mistakes are refused before anything long begins.
    check_output(args.output)
    resolve_templates(args.templates)
    vocabulary = None if args.vocabulary is None else read_vocabulary(args.vocabulary)
    steps.labels_from(args)
    results, training_log = args.results or _beside(args, RESULTS_NAME), _beside(args, TRAINING_LOG_NAME)
    measured = None if results is None else EvaluationResult.from_json(results)
    training_curves(training_log)
    model, tokenizer, image_processor = steps.load_steered_clip(args, texts=False)
    model.set_steering(**steps.steering_from(args))
    dataset = steps.open_dataset(args)
    if args.label_column is None and "label" in (dataset.features or {}):
        args.label_column = "label"
    labels = steps.labels_from(args, dataset, model, tokenizer)
    store = _activations(args, model.clip, dataset, image_processor)
    if not steps.join_processes().is_main_process:  # they have shared the extraction
        return
    page = build_atlas(
        model,
        tokenizer,
        store,
        dataset,
        args.output,
        image_column=args.image_column,
        class_names=labels,
        vocabulary=vocabulary,
        templates=args.templates,
        results=measured,
        training_log=training_log,
        top_images=args.top_images,
        meta={"checkpoint": args.checkpoint, "dataset": _dataset_name(args)},
        clean=not args.names_as_given,
        progress=not args.disable_tqdm,
    )
    say_written({"atlas": page, "for programs": page.with_name("latents.json"), "activations": store.path})
    say("", f"Open it in a browser: {page.absolute().as_uri()}")


def _activations(args: Namespace, clip: Any, dataset: Any, image_processor: Any) -> ActivationStore:
    """The store that a flag names, if it is of these images, or one extracted when needed."""
    from ...data.labels.names import with_numbered_labels
    from ...data.stores.activations import ActivationStore, StoreError
    from ...data.stores.fingerprint import dataset_fingerprint

    column = args.label_column
    if args.activations is None:
        cache = steps.activations_beside(args)
        return steps.extract(args, clip, dataset, cache, label_column=column, image_processor=image_processor)
    store = ActivationStore.open(args.activations)
    made_from, column = store.metadata["dataset"]["fingerprint"], store.metadata["columns"]["label"]
    dataset = with_numbered_labels(dataset, column)
    if dataset_fingerprint(dataset, args.image_column, column) != made_from:
        raise StoreError(
            f"The activations in {store.path} are not of these images, or of others by now: give --dataset and "
            "--split as they were extracted with, or leave out --activations"
        )
    return store


def _beside(args: Namespace, name: str) -> Path | None:
    """A file of the checkpoint's folder, if it is there."""
    path = Path(args.checkpoint, args.subfolder or "", name)
    return path if path.is_file() else None


def _dataset_name(args: Namespace) -> str:
    name = Path(args.dataset).name if Path(args.dataset).exists() else args.dataset
    return " ".join(part for part in (name, args.split) if part)
