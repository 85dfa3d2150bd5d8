"""Flags that several commands have."""

from __future__ import annotations

from typing import Any

from ..config.schema import LARGEST_BATCH, LARGEST_SEED, Kind, whole
from ..config.steering import QUANTILE, Steering
from .parsing import Parser


BATCH = whole(1, LARGEST_BATCH)
LAYER = whole(-1000, 1000)
GATE = Kind(
    "a quantile above 0 and below 1, or none",
    lambda value: value == "none" or QUANTILE.accepts(value),
    of_text=lambda text: text if text == "none" else float(text),
)
REMEMBERED = "those that the checkpoint was adapted to"


def add_model(parser: Parser, required: bool = True) -> None:
    parser.flag("--model", required=required, metavar="M", help="CLIP model: Hub id or folder.")
    parser.flag("--revision", help="Branch, tag or commit of a model on the Hub.")


def add_dataset(parser: Parser, required: bool = True) -> None:
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


def add_extraction(parser: Parser, beside_checkpoint: bool = False) -> None:
    """`beside_checkpoint`: for commands that cache activations in the folder of a checkpoint."""
    if beside_checkpoint:
        parser.flag("--activations_dir", writes="folder", help="Cache root [CHECKPOINT/activations].")
    parser.flag("--batch_size", kind=BATCH, default=64, help="Images per forward pass of CLIP.")
    parser.flag(
        "--num_workers",
        kind=whole(0, 1024),
        help="Processes that decode and resize; 0: the main one does it, when a batch's turn comes "
        "[threads, as many as there are processors to have].",
    )
    parser.flag(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of the activations on disk."
    )
    add_on_error(parser)


def add_on_error(parser: Parser) -> None:
    parser.flag("--on_error", choices=("raise", "skip"), default="raise", help="What to do at an unreadable image.")


def add_speed(parser: Parser) -> None:
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


def add_checkpoint(parser: Parser) -> None:
    parser.flag("--checkpoint", required=True, metavar="O", help="Folder or Hub id that `hf-vs2 train` wrote.")
    parser.flag("--clip", metavar="M", help="CLIP to use instead of the one that the checkpoint names.")
    parser.flag("--revision", help="Branch, tag or commit of a checkpoint on the Hub.")
    parser.flag("--subfolder", help="Folder of the checkpoint in its repository.")


def add_labels(parser: Parser, otherwise: str = "", templates: Any = "single", of_classes: bool = False) -> None:
    """What an image may be, and how CLIP is asked.

    Args:
        otherwise: where labels come from when none are given. With [`REMEMBERED`], prompts do too: read both by
            `labels_and_prompts`.
        templates: the default; of a command that compares several, a list.
        of_classes: whether they are names for the classes of a data set.
    """
    matched = ", matched by name with the data set's classes" if of_classes else ""
    parser.flag(
        "--labels",
        nargs="+",
        required=not otherwise,
        metavar="NAME",
        help=f"Labels to choose from{matched}, or a file of them (.txt, .csv, .json)"
        + (f" [{otherwise}]." if otherwise else "."),
    )
    parser.flag(
        "--templates",
        nargs="+" if isinstance(templates, list) else None,
        default=templates,
        metavar="T",
        help="single, ensemble or a file of prompts (.txt, .csv, .json).",
    )
    parser.flag(
        "--names_as_given",
        action="store_true",
        help="Put labels into prompts as they are; else `_` is read as a blank, and numbering such as 001. goes.",
    )


def add_label_column(parser: Parser, use: str, default: str | None = None) -> None:
    parser.flag("--label_column", default=default, metavar="NAME", help=f"Column of labels, numbers or names{use}")


def add_steering(parser: Parser, method: bool = False) -> None:
    """`method`: for commands that use one method, rather than compare several."""
    parser.section("steering (by default what the checkpoint says)")
    for name in steering_flags(method):
        if name == "gate":
            text = Steering.__dataclass_fields__[name].metadata["help"]
            parser.flag("--gate", kind=GATE, metavar="Q", help=text)
        else:
            parser.dataclass_flags(Steering, [name], defaults=False)


def steering_flags(method: bool) -> list[str]:
    return [*(["method"] if method else []), "gamma", "lambda_", "coefficient", "gate", "fvu_threshold"]


def add_seed(parser: Parser, default: int, use: str) -> None:
    parser.flag("--seed", kind=whole(0, LARGEST_SEED), default=default, help=use)


def add_progress(parser: Parser) -> None:
    parser.flag("--disable_tqdm", action="store_true", help="No progress bar.")
