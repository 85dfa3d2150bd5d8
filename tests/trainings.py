"""Trainings of small SAEs, and stores of rows to train on."""

import torch

from hf_vs2 import ActivationStore, SAEConfig, SAETrainer, SAETrainingArguments
from hf_vs2.data.stores.store_format import read_shard_header, write_index, write_shard


HIDDEN = 24


def make_trainer(folder, rows, *, config=None, model=None, indices=None, labels=None, label_loss=None, **arguments):
    defaults = {"max_steps": 20, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "dead_latent_threshold": 8}
    defaults |= {"save_steps": 0, "logging_steps": 5, "disable_tqdm": True}
    model = model or SAEConfig(hidden_size=HIDDEN, **{"num_latents": 96, "top_k": 3, **(config or {})})
    arguments = SAETrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return SAETrainer(model, arguments, rows, indices=indices, labels=labels, label_loss=label_loss)


def make_store(folder, rows, labels=None, *, layer=2, shard_size=700, class_names=None, **changed):
    """An activation store of these rows, written as extraction writes it, without images or a model."""
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, len(rows), shard_size)):
        part = slice(start, start + shard_size)
        tensors = {f"layer_{layer}": rows[part].contiguous(), "image_index": torch.arange(len(rows))[part]}
        if labels is not None:
            tensors["label"] = labels[part].contiguous()
        write_shard(folder, number, tensors, {})
        header = read_shard_header(folder, number)
        shards.append({"rows": header["rows"], "bytes": header["bytes"]})
    index = {
        "format": "hf_vs2.activations",
        "format_version": 1,
        "model": {"id": "someone/clip", "revision": "c0ffee", "fingerprint": "ab12", "dtype": "float32"},
        "layers": [layer],
        "site": "cls",
        "preprocessing": {"size": {"shortest_edge": 32}},
        "dataset": {"fingerprint": folder.name, "split": "train"},
        "columns": {"image": "image", "label": None if labels is None else "label"},
        "dtype": "float32",
        "dataset_id": f"someone/{folder.name}",
        "class_names": class_names,
        "hidden_size": rows.shape[1],
        "num_layers": 3,
        "base_model_fingerprint": [0.5, 0.25],
        "num_images": len(rows),
        "num_rows": len(rows),
        "skipped": [],
        "shards": shards,
        "complete": True,
    }
    write_index(folder, index | changed)
    return ActivationStore.open(folder)


def assert_same_weights(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def assert_close_weights(one, other, atol=1e-5):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=atol)
