"""Trainings of small SAEs, and stores of rows to train on."""

import torch

from hf_vs2 import ActivationStore, SAEConfig, SAETrainer, SAETrainingArguments
from hf_vs2.data.stores.store_format import FORMAT, FORMAT_VERSION, shard_name, write_index, write_shard


HIDDEN = 24


def make_trainer(folder, rows, *, config=None, model=None, indices=None, labels=None, label_loss=None, **arguments):
    defaults = {"max_steps": 20, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "dead_latent_threshold": 8}
    defaults |= {"save_steps": 0, "logging_steps": 5, "disable_tqdm": True}
    model = model or SAEConfig(hidden_size=HIDDEN, **{"num_latents": 96, "top_k": 3, **(config or {})})
    arguments = SAETrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return SAETrainer(model, arguments, rows, indices=indices, labels=labels, label_loss=label_loss)


def finish_store(folder, rows_per_shard, hidden, layers, **about):
    """Declares the shards in `folder` a complete store, as extraction does, and opens it."""
    shards = [{"rows": n, "bytes": (folder / shard_name(i)).stat().st_size} for i, n in enumerate(rows_per_shard)]
    index = {"format": FORMAT, "format_version": FORMAT_VERSION, "site": "cls", "dtype": "float32", "complete": True}
    index |= {"model": {"id": "someone/clip", "revision": None, "fingerprint": "ab12", "dtype": "float32"}}
    index |= {"preprocessing": {}, "dataset": {"fingerprint": "cd34", "split": None}, "class_names": None}
    index |= {"columns": {"image": "image", "label": None}, "layers": layers, "hidden_size": hidden, "num_layers": 3}
    write_index(folder, index | {"num_rows": sum(rows_per_shard), "shards": shards} | about)
    return ActivationStore.open(folder)


def make_store(folder, rows, labels=None, *, layer=2, shard_size=700, class_names=None, **changed):
    """An activation store of these rows, written as extraction writes it, without images or a model."""
    folder.mkdir(parents=True)
    counts = []
    for number, start in enumerate(range(0, len(rows), shard_size)):
        part = slice(start, start + shard_size)
        tensors = {f"layer_{layer}": rows[part].contiguous(), "image_index": torch.arange(len(rows))[part]}
        if labels is not None:
            tensors["label"] = labels[part].contiguous()
        write_shard(folder, number, tensors, {})
        counts.append(len(rows[part]))
    about = {
        "model": {"id": "someone/clip", "revision": "c0ffee", "fingerprint": "ab12", "dtype": "float32"},
        "preprocessing": {"size": {"shortest_edge": 32}},
        "dataset": {"fingerprint": folder.name, "split": "train"},
        "columns": {"image": "image", "label": None if labels is None else "label"},
        "dataset_id": f"someone/{folder.name}",
        "class_names": class_names,
        "base_model_fingerprint": [0.5, 0.25],
        "num_images": len(rows),
        "skipped": [],
    }
    return finish_store(folder, counts, rows.shape[1], [layer], **about | changed)


def assert_same_weights(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def assert_close_weights(one, other, atol=1e-5):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=atol)
