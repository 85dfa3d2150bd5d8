"""Images to CLS activations: one pass through a frozen CLIP vision tower, cached in an [`ActivationStore`]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ...config.schema import COUNT, one_of, optional, whole
from ...encoders.base_model import resolve_layer
from ...encoders.families import family_of
from ...encoders.fingerprints import vision_fingerprint
from ...encoders.vision_tower import VisionTower
from ...version import __version__
from ..batches import Columns, ImageReader
from ..images import UnreadableImageError
from ..labels.names import class_names_of
from ..load import prepared
from ..pixels import describe_processor, reading_fast
from .extraction import Extraction
from .fingerprint import dataset_fingerprint as fingerprint_of_dataset
from .store import ActivationStore
from .store_format import FORMAT, FORMAT_VERSION, ROW_DTYPES, StoreError, request_key, request_of


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["ActivationStore", "StoreError", "extract_activations"]


def extract_activations(
    model: nn.Module | str | os.PathLike,
    dataset: Dataset | IterableDataset,
    output_dir: str | os.PathLike,
    *,
    layers: Sequence[int] = (-1,),
    image_column: str = "image",
    label_column: str | None = None,
    image_processor: Any = None,
    revision: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    dtype: str | torch.dtype = "float32",
    model_dtype: str | torch.dtype = "auto",
    fast_decode: bool = False,
    on_error: str = "raise",
    shard_size: int = 4096,
    device: str | torch.device | None = None,
    progress: bool = True,
    dataset_id: str | None = None,
    dataset_fingerprint: str | None = None,
) -> ActivationStore:
    """
    CLS rows of every image of `dataset`, in its order, on disk.

    The row of the last layer is what `vision_model.post_layernorm` receives (`last_hidden_state[:, 0]`); that of
    another layer is the CLS token in the output of `vision_model.encoder.layers[layer]`. The tower is run up to the
    deepest layer asked for, in eval mode and inference mode; the model given is left exactly as it was.

    `output_dir` is a cache root: each request gets its own subfolder, named after a hash of everything that decides
    the rows (model and weights, layers, preprocessing, images and labels, columns, dtype), and returned as
    `store.path`. Train and test split, several layers or several models can so share one `output_dir`, a changed
    request can never be answered with old rows, and processes that extract different things at once do not meet. A
    second call with the same request opens the finished store and decodes no image; after an interruption it continues
    with the first unfinished shard and ends with the files an uninterrupted run would have written. Processes that
    make the same request at once wait for each other; with `torch.distributed` initialised they share the work,
    each taking the next shard that is left (`output_dir` must be on a file system they all see).

    Args:
        model: a `CLIPModel` (or its vision model), a Hub id or a local path. Passed as an object it is used on the
            device and in the dtype it has.
        dataset: from [`load_images`], or any map-style or streaming data set with a column of images.
        output_dir: cache root, made when needed.
        layers (`Sequence[int]`): layers from 0, negative ones counted from the last.
        image_column (`str`): paths, encoded bytes, PIL images or arrays; see [`~hf_vs2.data.open_image`].
        label_column (`str`, *optional*): labels to keep beside the rows, integers or names.
        image_processor (*optional*): default: that of the CLIP. Only resizing and cropping run in it; rescaling and
            normalisation follow on the device, with the same result to 1e-6.
        revision (`str`, *optional*): of a Hub model given by id.
        batch_size (`int`): images per forward pass.
        num_workers (`int`, *optional*): processes that decode, resize and crop the next batches; 0 does it in this
            one, when a batch's turn comes. By default threads read ahead, as many as there are processors to have.
            Rows do not depend on it.
        dtype (`str` or `torch.dtype`): of the rows on disk, "float32", "bfloat16" or "float16".
        model_dtype (`str` or `torch.dtype`): in which a model given by name runs, one of the same; "auto" is that of
            its file. A store of another one is another store.
        fast_decode (`bool`): decode large JPEGs at a fraction of their size and resize the part alone that is looked
            at: faster, to slightly other pixels, in a store of its own.
        on_error (`str`): "raise" stops at an image that cannot be read, "skip" leaves it out; what was skipped is
            logged and listed in `store.metadata["skipped"]`.
        shard_size (`int`): images per file, the step in which an interrupted extraction continues. Several processes
            make smaller files where each would get fewer than eight.
        device (*optional*): default: the model's own; for a model given by name, a GPU if there is one.
        progress (`bool`): show a progress bar, on the main process only.
        dataset_id (`str`, *optional*): name of the data set, for the records only.
        dataset_fingerprint (`str`, *optional*): stands for the images instead of the one worked out from the data;
            needed for streams whose source cannot be seen (see [`~hf_vs2.fingerprint.dataset_fingerprint`]).

    Returns:
        [`ActivationStore`]

    Raises:
        UnreadableImageError: (a `ValueError`) naming the row and path of an image that cannot be read.
        ValueError: an argument that does not fit, a NaN or infinite row (the message names the image), no image left.
        ValueError: a model of a family that nothing can steer yet; a CLIP that lacks weights, or whose weights can't
            be used.
        TypeError: what is no model, or a data set of another library.
        StoreError: (an `OSError`) files in the way that are not a store.
    """
    dtype = str(dtype).removeprefix("torch.")
    one_of(tuple(ROW_DTYPES)).read(dtype, "dtype")
    one_of(("raise", "skip")).read(on_error, "on_error")
    COUNT.read(batch_size, "batch_size")
    COUNT.read(shard_size, "shard_size")
    optional(whole(0)).read(num_workers, "num_workers")
    tower = VisionTower.of(model, revision, device, model_dtype)
    numbers = sorted({resolve_layer(layer, tower.num_layers) for layer in layers})
    if not numbers:
        raise ValueError("layers is empty: name at least one, such as layers=(-1,)")
    tower.check_layers(numbers)
    processor = image_processor if image_processor is not None else tower.image_processor()
    processor = getattr(processor, "image_processor", processor)  # of a CLIPProcessor
    processor = reading_fast(processor) if fast_decode else processor
    dataset = prepared(dataset, image_column, label_column)
    columns = Columns.of(dataset, image_column, label_column)
    fingerprint = dataset_fingerprint or fingerprint_of_dataset(dataset, image_column, label_column)
    index = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": tower.identity(),
        "layers": numbers,
        "site": family_of(tower.module).site,
        "preprocessing": describe_processor(processor),
        "dataset": {"fingerprint": fingerprint, "split": str(dataset.split) if dataset.split else None},
        "columns": columns.description(),
        "dtype": dtype,
        "dataset_id": dataset_id,
        "class_names": class_names_of(dataset, label_column),
        "hidden_size": tower.hidden_size,
        "num_layers": tower.num_layers,
        "base_model_type": tower.model_type,
        "base_model_fingerprint": vision_fingerprint(tower.module),
        "base_model_weights": tower.weights,
        "shard_size": shard_size,
        "made_with": {
            "hf_vs2": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": tower.device.type,
        },
        "complete": False,
    }
    folder = Path(os.path.abspath(Path(output_dir).expanduser())) / request_key(request_of(index))
    reader = ImageReader(dataset, columns, processor)
    store = Extraction(tower, reader, index, folder, batch_size, num_workers, on_error == "skip", progress).run()
    if on_error == "raise" and store.metadata["skipped"]:
        skipped = store.metadata["skipped"]
        raise UnreadableImageError(
            f"The store {store.path} was made with on_error='skip' and lacks {len(skipped)} images; the first: "
            f"{skipped[0]['error']}. Mend the images, or accept it with on_error='skip'"
        )
    return store
