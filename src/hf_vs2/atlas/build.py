"""[`build_atlas`]: from cached rows and their images to a folder that a browser opens."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.schema import COUNT
from ..data.labels.lists import Names
from ..data.labels.prompts import class_embeddings
from ..data.stores.rows import Rows, RowSource, StoreRows
from ..evaluation.inputs import check_replayable, replayable_rows
from ..files.checkpoint_folder import shown_name
from ..files.report import Results
from ..version import __version__
from .effects import effect_of
from .material import Material, image_facts, replay_of, results_table, rows_on_pages, training_curves, truth_of
from .names import words_of
from .pages import detail_pages, image_pages, index_page, machine_readable, overview_page, short
from .statistics import companions, gather, nearest_latents, spread
from .writing import atlas_folder, check_output, write_assets, write_data, write_manifest, write_thumbnails


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

NUM_NEAREST = 6


@torch.no_grad()
def build_atlas(
    model: VS2CLIPForZeroShot,
    tokenizer: PreTrainedTokenizerBase | Mapping[str, torch.Tensor] | None,
    rows: RowSource,
    dataset: Dataset | IterableDataset,
    output_dir: str | PathLike,
    *,
    image_column: str = "image",
    labels: torch.Tensor | Sequence[int] | None = None,
    class_names: Names | None = None,
    vocabulary: Sequence[str] | None = None,
    templates: str | Path | Sequence[str] = "single",
    results: Results | None = None,
    training_log: str | PathLike | None = None,
    top_images: int = 24,
    batch_size: int = 1024,
    meta: Mapping[str, Any] | None = None,
    clean: bool = True,
    progress: bool = False,
) -> Path:
    """
    A self-contained folder of static HTML in which a person browses the latents of an SAE; it opens from disk, without
    a server.

    Parts whose input is missing (labels, a training log, results) are left out, and the page says why. The folder also
    holds `latents.json`, the same for programs: a list `latents` of objects with `index`, `names` (`[{"name",
    "score"}]`), `named` (whether the first of them scores above chance), `away`, `share`, `mean`, `max`, `top_images`,
    `classes`, `nearest`, `companions` and `effect`.

    Args:
        model: the wrapper, with one SAE, on the last layer; its gamma, lambda and gate are what fixed and broken
            images are of. It is left as it was found.
        tokenizer: the tokenizer of its CLIP, or the embeddings of labels and words as [`class_embeddings`] takes them.
            `None` for a model without texts: latents then have no names, and answers are not shown.
        rows: CLS rows of the last layer, before `post_layernorm`, one an image: a tensor `(n, hidden_size)` or an
            activation store.
        dataset: the images that the rows were made from, which is read for thumbnails only.
        output_dir: the folder, which must be new, empty or an earlier atlas; that is replaced.
        image_column: the data set's column of images.
        labels: the class of each row `(n,)`; by default the store's, if it has them.
        class_names: the names of the classes, as [`evaluate`] takes them; by default the store's.
        vocabulary: words to name latents with, see [`name_latents`]; by default [`common_words`] and the class names.
        templates: prompts around words and class names, anything [`resolve_templates`] takes.
        results: what [`evaluate`] returned or wrote, for the comparison table.
        training_log: the `training_log.json` of the trainer, for the curves.
        top_images: images of each latent.
        batch_size: rows at a time. Memory grows with the images only by a few numbers each.
        meta: `checkpoint` and `dataset`, names to show.
        clean: read class names by [`clean_class_names`] before they go into prompts.
        progress: show progress bars.

    Returns:
        The path of `index.html`.

    Raises:
        ValueError, TypeError: on rows, labels, names or templates that do not fit, as [`evaluate`] does, on a data set
            of another size than the rows come from, and on a file that is no training log or result file.
        UnreadableImageError: (a `ValueError`) an image can't be read.
        OSError: the folder holds other files, or can't be written.
    """
    folder = Path(os.path.abspath(Path(output_dir).expanduser()))
    check_output(folder)
    COUNT.read(top_images, "top_images")
    check_replayable(model)
    rows = replayable_rows(model, rows, "rows")
    image_indices = _image_indices(rows, dataset)
    truth = truth_of(rows, labels, class_names, clean)
    training, table = training_curves(training_log), results_table(results)

    number = len(truth.class_names)
    words = words_of(model, tokenizer, vocabulary, truth.class_names, templates, progress)
    embeds = (
        class_embeddings(model.clip, tokenizer, truth.class_names, templates, progress=progress, clean=False)
        if number > 1 and tokenizer is not None
        else None
    )
    statistics = gather(model, rows, truth.labels, number, top_images, batch_size, progress)
    histograms = spread(model, rows, statistics.low, statistics.high, batch_size, progress)
    on_page = [rows_on_pages(statistics, histograms, latent) for latent in range(statistics.num_latents)]
    replay = replay_of(model, rows, truth, embeds, batch_size, progress)
    examples = [] if replay is None else [one.row for one in [*replay.fixed, *replay.broken]]
    shown = sorted({*examples, *(row for some in on_page for row in some)})
    material = Material(
        model=model,
        statistics=statistics,
        spread=histograms,
        companions=companions(torch.cat(statistics.active), statistics.num_latents, NUM_NEAREST),
        nearest=nearest_latents(model.sae.W_dec, NUM_NEAREST),
        truth=truth,
        image_indices=image_indices,
        words=words,
        effects=[
            None if embeds is None else effect_of(model, rows, some, latent, embeds)
            for latent, some in enumerate(on_page)
        ],
        images=image_facts(model, rows, shown, batch_size),
        replay=replay,
        training=training,
        results=table,
        facts=_facts(model, words.source, dict(meta or {})),
    )
    _write(folder, material, dataset, image_column, progress)
    return folder / "index.html"


def _write(folder: Path, material: Material, dataset: Any, image_column: str, progress: bool) -> None:
    with atlas_folder(folder) as temporary:
        write_assets(temporary)
        write_data(temporary, "overview", overview_page(material))
        write_data(temporary, "latents", index_page(material))
        for number, page in enumerate(detail_pages(material)):
            write_data(temporary, f"latents-{number:04d}", page)
        for number, page in image_pages(material):
            write_data(temporary, f"images-{number:04d}", page)
        write_manifest(temporary, material.facts, machine_readable(material))
        wanted = sorted(material.image_indices[row] for row in material.images)
        write_thumbnails(temporary, dataset, image_column, wanted, progress)


def _image_indices(rows: Rows, dataset: Any) -> list[int]:
    """Row of the data set of each row. Refuses a data set that can't be the one they were made from."""
    import datasets

    number = rows.store.metadata["num_images"] if isinstance(rows, StoreRows) else len(rows)
    if isinstance(dataset, datasets.Dataset) and len(dataset) != number:
        raise ValueError(
            f"The activations are of {number} images, but the data set has {len(dataset)}: give the images (and the "
            "split) that they were made from."
        )
    return rows.store.image_indices.tolist() if isinstance(rows, StoreRows) else list(range(number))


def _facts(model: VS2CLIPForZeroShot, vocabulary: str, meta: dict[str, Any]) -> dict[str, Any]:
    """What the head of the page and `latents.json` say about where everything comes from."""
    sae, now = model.sae.config, model.steering_settings
    with model.steering(enabled=True, method="vs2"):  # which the atlas replays
        (tau,) = model.fvu_thresholds.values()
    sources = {
        "checkpoint": meta.get("checkpoint") or sae.name_or_path,
        "dataset": meta.get("dataset"),
        "base_model": sae.base_model_name_or_path or model.config.base_model_name_or_path,
    }
    return {
        **{what: shown_name(str(name)) if name else None for what, name in sources.items()},
        "num_latents": sae.num_latents,
        "top_k": sae.top_k,
        "activation": sae.activation,
        "gamma": "one a latent" if isinstance(now.gamma, tuple) else now.gamma,
        "lambda": now.lambda_,
        "gate": now.gate,
        "fvu_threshold": tau if tau in (None, math.inf) else short(tau),
        "vocabulary": vocabulary,
        "made_with": f"hf_vs2 {__version__}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
