"""CLS rows are what the model computes, are made once, and a store is either whole and right or refused by name."""

import copy
import json
import os
import pickle
import shutil

import datasets
import numpy as np
import pytest
import torch
from image_stores import contents, make_dataset, make_processor, noise_image
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from hf_vs2.data import UnreadableImageError, load_images, open_image
from hf_vs2.data import batches as image_batches
from hf_vs2.data.pixels import Normalizer
from hf_vs2.data.stores.activations import ActivationStore, StoreError, extract_activations
from hf_vs2.data.stores.fingerprint import dataset_fingerprint
from hf_vs2.data.stores.rows import rows_of


@pytest.fixture()
def extract(tiny_clip, tmp_path):
    """`extract_activations` on the tiny CLIP, into a fresh folder, in shards of 8 images."""

    def run(dataset, output_dir=None, **options):
        options = {"model": tiny_clip, "image_processor": make_processor(), "batch_size": 4, "shard_size": 8} | options
        model = options.pop("model")
        return extract_activations(model, dataset, output_dir or tmp_path / "cache", progress=False, **options)

    return run


@pytest.fixture()
def opened(monkeypatch):
    """Names of the images that were opened, in this process."""
    names = []

    def spy(value, name, **options):
        names.append(name)
        return open_image(value, name, **options)

    monkeypatch.setattr(image_batches, "open_image", spy)
    return names


# The rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_are_the_cls_states_of_the_whole_model_on_the_processors_images(extract, tiny_clip, attention):
    tiny_clip.set_attn_implementation(attention)
    modes = ("RGB", "L", "RGBA", "P", "CMYK")
    rows = [noise_image(n, modes[n % 5]) for n in range(23)]
    dataset = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    store = extract(dataset, layers=(-1, 0, 1))

    # `open_image` here because the oldest transformers of our range drops transparency instead of compositing it
    pixels = make_processor()(images=[open_image(row) for row in rows], return_tensors="pt")["pixel_values"]
    seen = []
    hook = tiny_clip.vision_model.post_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        whole = tiny_clip.vision_model(pixels, output_hidden_states=True)
    hook.remove()
    assert store.layers == [0, 1, 2]
    for layer in store.layers:
        torch.testing.assert_close(store.tensor(layer), whole.hidden_states[layer + 1][:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(store.tensor(-1), seen[0], atol=1e-4, rtol=1e-4)
    assert store.tensor(-1).std(dim=0).min() > 1e-3  # different images, different rows


@pytest.mark.parametrize("size", [(32, 32), (31, 200), (640, 480), (33, 32), (1, 1), (5, 90)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"height": 20, "width": 30}, "do_center_crop": False},
        {"size": {"shortest_edge": 16}, "do_normalize": False},  # the crop pads
        {"do_rescale": False, "resample": 0, "image_mean": [1.0, 2.0, 3.0]},
    ],
)
def test_preprocessing_equals_the_processor(size, options):
    processor = CLIPImageProcessorPil(**({"size": {"shortest_edge": 48}, "crop_size": 48} | options))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    reader = image_batches.ImageReader(None, image_batches.Columns("image", None), processor)
    batch = reader[image_batches.Span(0, 1, [{"image": image}])]
    ours = Normalizer(processor, torch.device("cpu"))(batch.pixels)
    theirs = processor(images=[image], return_tensors="pt")["pixel_values"].float()
    whole = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert batch.pixels.dtype == torch.uint8 and torch.equal(batch.pixels, whole)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_model_is_left_exactly_as_it_was(extract, tiny_clip):
    tiny_clip.train()
    tiny_clip.vision_model.encoder.layers[1].eval()
    modes = [module.training for module in tiny_clip.modules()]
    weights = {name: tensor.clone() for name, tensor in tiny_clip.state_dict().items()}
    config = copy.deepcopy(tiny_clip.config)
    generator = torch.get_rng_state()
    extract(make_dataset())
    assert modes == [module.training for module in tiny_clip.modules()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_clip.state_dict().items())
    assert tiny_clip.config == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_clip.modules())
    assert torch.equal(generator, torch.get_rng_state())  # a seeded run that follows is not disturbed


def test_training_mode_and_autocast_around_the_call_change_no_row(extract, tiny_clip, tmp_path):
    for layer in tiny_clip.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    plain = extract(make_dataset()).tensor()
    tiny_clip.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract(make_dataset(), tmp_path / "again").tensor(), plain)


def test_workers_streams_and_formats_give_the_same_files(extract, tmp_path):
    """What is stored depends on the images, not on how they are fed."""
    dataset = make_dataset()
    plain = extract(dataset, label_column="label", dataset_fingerprint="x")
    dataset.to_parquet(tmp_path / "images" / "train.parquet")
    for name, other, options in (
        ("workers", dataset, {"num_workers": 2}),
        ("in turn", dataset, {"num_workers": 0}),
        ("format", dataset.with_format("torch"), {}),
        ("stream", load_images(tmp_path / "images", streaming=True), {}),
        ("stream, workers", load_images(tmp_path / "images", streaming=True), {"num_workers": 2}),
        ("stream of decoded images", datasets.IterableDataset.from_generator(decoded_rows), {}),
    ):
        store = extract(other, tmp_path / name, label_column="label", dataset_fingerprint="x", **options)
        shards = {file: data for file, data in contents(store.path).items() if file != "index.json"}
        for file, data in shards.items():
            ours, theirs = load_file(store.path / file), load_file(plain.path / file)
            assert len(data) > 0 and all(torch.equal(ours[key], theirs[key]) for key in theirs), name
        assert len(store) == len(plain) == 23


def decoded_rows():
    yield from make_dataset()


def test_bfloat16_rows_and_a_bfloat16_model(extract, tiny_clip, tmp_path):
    exact = extract(make_dataset()).tensor()
    half = extract(make_dataset(), dtype="bfloat16")
    assert half.take([0, 1]).dtype == torch.float32
    assert torch.equal(half.tensor(), exact.bfloat16().float())
    model = copy.deepcopy(tiny_clip).to(torch.bfloat16)
    rows = extract(make_dataset(), model=model).tensor()
    assert 0 < (rows - exact).norm() / exact.norm() < 0.05


def test_rows_that_overflow_name_the_image(extract, tiny_clip):
    dataset = make_dataset(modes=("RGB",))
    with torch.no_grad():
        tiny_clip.vision_model.encoder.layers[1].mlp.fc2.weight.mul_(1e5)
    with pytest.raises(ValueError, match="image 0 after layer 2 does not fit into torch.float16"):
        extract(dataset, dtype="float16")
    with torch.no_grad():
        tiny_clip.half().vision_model.encoder.layers[1].mlp.fc2.weight.fill_(6e4)
    with pytest.raises(ValueError, match="image 0 after layer 1 is not finite: the model overflows in torch.float16"):
        extract(dataset, layers=(1,))
    assert extract(dataset, layers=(0,)).tensor().isfinite().all()  # the tower stops before the bad layer


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("cifar10", "cifar10_test"), ("cub100", "cub")])
def test_rows_equal_ready_ones_of_a_real_encoder(shared_data, tmp_path, name, rows):
    """The ready rows are a random part of the whole split, by independent code: what is in both must agree."""
    dataset = load_images(shared_data / name, "test[:48]")
    store = extract_activations(
        str(shared_data / "clip-vit-tiny-lit"), dataset, tmp_path, label_column="label", device="cpu", progress=False
    )
    ready = load_file(shared_data / "activations" / f"{rows}.safetensors")
    distance, match = torch.cdist(store.tensor(), ready["cls"], compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    found = distance < 1e-3 * ready["cls"].norm(dim=1).mean()
    assert found.sum() >= 5
    assert torch.equal(store.labels[found], ready["label"][match[found]])
    torch.testing.assert_close(store.tensor()[found], ready["cls"][match[found]], atol=1e-4, rtol=1e-4)


# Made once, for one request


def test_a_second_run_decodes_nothing_wherever_the_data_and_their_cache_are(extract, opened, tmp_path):
    make_dataset().to_parquet(tmp_path / "here" / "train.parquet")
    dataset = load_images(tmp_path / "here")
    first = extract(dataset, label_column="label")
    assert len(opened) == 23
    opened.clear()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    os.utime(tmp_path / "there" / "train.parquet", (1, 1))
    dataset.save_to_disk(tmp_path / "saved")
    for again in (tmp_path / "here", tmp_path / "there", tmp_path / "saved"):
        assert extract(load_images(again), label_column="label").path == first.path
        assert not opened


@pytest.mark.parametrize("budget", [2**26, 1000])
def test_an_image_folder_is_known_by_its_files(extract, opened, tmp_path, budget, monkeypatch):
    """Small sets by content, large ones (made one here by a tiny budget) by names, sizes and dates."""
    monkeypatch.setattr("hf_vs2.data.stores.fingerprint.CONTENT_BUDGET", budget)
    for n in range(9):
        (tmp_path / "here" / f"{n % 3}").mkdir(parents=True, exist_ok=True)
        noise_image(n).save(tmp_path / "here" / f"{n % 3}" / f"{n}.bmp")
    first = extract(load_images(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")  # keeps dates
    opened.clear()
    assert extract(load_images(tmp_path / "there")).path == first.path
    assert not opened
    swapped = tmp_path / "there" / "1" / "4.bmp"
    data = bytearray(swapped.read_bytes())
    data[-1] ^= 255
    swapped.write_bytes(data)  # same name, same size
    assert extract(load_images(tmp_path / "there")).path != first.path
    assert len(opened) == 9


def test_a_large_set_of_embedded_images_is_known_by_sizes_and_a_sample(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_vs2.data.stores.fingerprint.CONTENT_BUDGET", 1000)

    def known_as(dataset):
        return dataset_fingerprint(dataset, "image", None)

    dataset = make_dataset()
    dataset.to_parquet(tmp_path / "images.parquet")
    assert known_as(load_images(tmp_path / "images.parquet")) == known_as(dataset)
    assert known_as(dataset.select([2, 0, 1])) == known_as(dataset.select([1, 2, 0]).select([1, 2, 0]))
    others = [
        dataset.select(range(22)),
        dataset.select([1, 0, *range(2, 23)]),
        make_dataset(modes=("RGB",) * 22 + ("L",)),
        datasets.concatenate_datasets([dataset, dataset]),
    ]
    assert len({known_as(other) for other in [dataset, *others]}) == 5


def changed_weight(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.bias[3] += 1e-4
    return model


CHANGES = {
    "one weight": lambda o: o | {"model": changed_weight(o["model"])},
    "layers": lambda o: o | {"layers": (0, 2)},
    "preprocessing": lambda o: (
        o | {"image_processor": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32)}
    ),
    "dtype": lambda o: o | {"dtype": "float16"},
    "labels wanted": lambda o: o | {"label_column": None},
    "fewer images": lambda o: o | {"dataset": o["dataset"].select(range(22))},
    "another order": lambda o: o | {"dataset": o["dataset"].select([1, 0, *range(2, 23)])},
    "one image": lambda o: o | {"dataset": make_dataset(modes=("RGB",) * 22 + ("L",))},
    "one label": lambda o: o | {"dataset": o["dataset"].map(lambda row, n: {"label": int(n == 5)}, with_indices=True)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_request_is_never_answered_with_old_rows(extract, tiny_clip, change):
    options = {"dataset": make_dataset(), "model": tiny_clip, "layers": (2,), "label_column": "label"}
    first = extract(**options)
    assert extract(**(options | {"layers": (-1,), "batch_size": 7, "shard_size": 5})).path == first.path
    other = extract(**CHANGES[change](options))
    assert other.path != first.path
    assert other.path.parent == first.path.parent


def test_streams_are_told_apart_by_source_and_operations(extract, tmp_path, opened):
    def rows(count):
        yield from (make_dataset(count)[n] for n in range(count))

    def stream(count=9):
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"count": count})

    make_dataset(9).to_parquet(tmp_path / "a" / "train.parquet")
    parquet = [load_images(tmp_path / "a", streaming=True) for _ in range(2)]
    paths = {
        name: extract(data).path
        for name, data in {
            "generator": stream(),
            "other arguments": stream(8),
            "part": stream().take(5),
            "other part": stream().skip(1).take(5),
            "parquet": parquet[0],
            "part of parquet": parquet[0].take(4),
        }.items()
    }
    assert len(set(paths.values())) == len(paths)
    opened.clear()
    assert extract(stream()).path == paths["generator"]
    assert extract(parquet[1]).path == paths["parquet"]
    assert not opened

    (tmp_path / "b").mkdir()
    noise_image(1).save(tmp_path / "b" / "1.png")
    first = extract(load_images(tmp_path / "b", streaming=True))
    assert extract(load_images(tmp_path / "b", streaming=True)).path == first.path
    noise_image(2).save(tmp_path / "b" / "1.png")
    assert extract(load_images(tmp_path / "b", streaming=True)).path != first.path

    running = (number for number in range(3))  # nothing can tell what is in there
    with pytest.raises(ValueError, match="give it one with dataset_fingerprint='...'"):
        extract(stream().map(lambda row: {"label": next(running)}))


def test_opening_with_another_request_names_the_difference(extract, tmp_path):
    store = extract(make_dataset())
    index = json.loads((store.path / "index.json").read_text())
    request = {key: index[key] for key in ("model", "layers", "site", "preprocessing", "dataset", "columns", "dtype")}
    assert len(ActivationStore.open(store.path, request)) == 23
    request["preprocessing"] = request["preprocessing"] | {"resample": 2}
    with pytest.raises(StoreError, match=r"preprocessing\.resample: 2 != 3$"):
        ActivationStore.open(store.path, request)
    # an index that was edited by hand is not trusted either
    index["layers"] = [0]
    (store.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match=r"layers: \[2\] != \[0\]"):
        extract(make_dataset())


# Interruption and damage


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_extraction_continues_and_ends_with_the_same_files(extract, tmp_path, monkeypatch, streaming):
    """By Ctrl-C in the third of six shards. Real kills, at any moment: tests/survival/test_survives_kills.py."""
    dataset = make_dataset(45).to_iterable_dataset() if streaming else make_dataset(45)
    settings = {"layers": (0, -1), "label_column": "label", "dataset_fingerprint": "x", "num_workers": 0}
    whole, names = extract(dataset, tmp_path / "whole", **settings), []

    def interrupted(value, name, **options):
        names.append(name)
        if len(names) == 20:
            raise KeyboardInterrupt
        return open_image(value, name, **options)

    monkeypatch.setattr(image_batches, "open_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(dataset, tmp_path / "cut", **settings)
    folder = tmp_path / "cut" / whole.path.name
    done = len(list(folder.glob("shard-*")))
    assert 0 < done < 3
    with pytest.raises(StoreError, match="is unfinished: call `extract_activations` with the same arguments"):
        ActivationStore.open(folder)
    (folder / ".shard-00009.safetensors.0a1b2c3d.tmp").write_bytes(b"what a kill in the middle of writing leaves")
    assert extract(dataset, tmp_path / "cut", **settings).path == folder
    assert len(names) - 20 == 45 - 8 * done  # only what was missing was read
    assert contents(folder) == contents(whole.path)


def test_what_is_damaged_is_mended_when_extracted_again(extract, opened):
    """The shard that was cut or lost, and no other. How opening names it: tests/survival/test_every_artefact.py."""
    store = extract(make_dataset())
    whole = contents(store.path)
    shard, index = store.path / "shard-00001.safetensors", store.path / "index.json"
    for damage in (lambda: shard.write_bytes(whole[shard.name][:-100]), shard.unlink):
        damage()
        opened.clear()
        assert len(extract(make_dataset())) == 23 and opened == [f"image {n}" for n in range(8, 16)]
        assert contents(store.path) == whole
    index.write_text(whole["index.json"].decode().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(StoreError, match="format version 2, this hf_vs2 reads version 1"):
        ActivationStore.open(store.path)


def test_a_folder_of_several_stores_lists_them(extract, tmp_path):
    store = extract(make_dataset(), dataset_id="noise")
    assert ActivationStore.open(tmp_path / "cache").path == store.path
    extract(make_dataset(), layers=(0,))
    with pytest.raises(StoreError, match=r"holds 2 activation stores.*noise, layers \[2\]"):
        ActivationStore.open(tmp_path / "cache")
    with pytest.raises(StoreError, match="No activation store at"):
        ActivationStore.open(tmp_path)


# Images that cannot be read, arguments that do not fit


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_and_labels_go_with_the_images_that_are_left(extract, num_workers):
    """In a process of their own too, where errors must be pickled; and strictly asked for, a store that lacks images is
    none."""
    dataset = make_dataset(broken=(3, 17))
    with pytest.raises(UnreadableImageError, match=r"^image 3 \(photo 3\.png\) cannot be read.*on_error='skip'"):
        extract(dataset, label_column="label", num_workers=num_workers)
    store = extract(dataset, label_column="label", num_workers=num_workers, on_error="skip")
    kept = [n for n in range(23) if n not in (3, 17)]
    assert [(item["index"], item["path"]) for item in store.metadata["skipped"]] == [
        (n, f"photo {n}.png") for n in (3, 17)
    ]
    assert store.image_indices.tolist() == kept and store.labels.tolist() == [n % 3 for n in kept]
    torch.testing.assert_close(store.tensor(), extract(make_dataset()).tensor()[kept], atol=1e-4, rtol=1e-4)
    with pytest.raises(UnreadableImageError, match="made with on_error='skip' and lacks 2 images; the first: image 3"):
        extract(dataset, label_column="label")


def test_a_shard_without_a_readable_image_and_a_set_without_one(extract):
    store = extract(make_dataset(broken=tuple(range(8, 16))), on_error="skip")
    assert store.take([7, 8, -1]).shape == (3, 32)
    assert store.image_indices.tolist() == [*range(8), *range(16, 23)]
    with pytest.raises(ValueError, match="None of the 9 images can be read; the first: image 0"):
        extract(make_dataset(9, broken=tuple(range(9))), on_error="skip")
    for empty in (make_dataset(9).select([]), make_dataset(9).to_iterable_dataset().take(0)):
        with pytest.raises(ValueError, match="The data set is empty"):
            extract(empty)


def test_arguments_that_do_not_fit_are_refused_with_what_would(extract, tiny_clip, tmp_path):
    dataset = make_dataset()
    for options, message in (
        ({"layers": (3,)}, "layer=3 does not exist: the vision tower has 3 layers"),
        ({"layers": ()}, "layers is empty"),
        ({"dtype": "float8"}, "dtype='float8' is not known; did you mean 'float32'"),
        ({"on_error": "ignore"}, "on_error='ignore' is not known; use one of raise, skip"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 .*, not 0"),
        ({"label_column": "class"}, "no column 'class'; it has image, label"),
        ({"label_column": "image"}, "labels must be integers"),
        ({"image_column": "img"}, "no column 'img'; it has image, label; pass image_column='image'"),
        ({"revision": "main"}, "revision='main' is for a model given by its Hub id"),
        ({"image_processor": CLIPImageProcessorPil()}, "224.*32"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(dataset, **options)
    with pytest.raises(TypeError, match="Linear has no CLIP vision tower: expected a CLIPModel"):
        extract(dataset, model=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got DatasetDict: open it with"):
        extract(datasets.DatasetDict({"train": dataset}))
    untyped = datasets.IterableDataset.from_generator(decoded_rows)
    with pytest.raises(ValueError, match="Row 0 has no column img; it has image, label"):
        extract(untyped, image_column="img")
    tiny_clip.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no image processor that can be loaded.*pass image_processor="):
        extract(dataset, model=str(tmp_path / "model"), image_processor=None)


def test_a_model_given_by_path_brings_its_processor_and_a_new_one_at_the_path_is_noticed(extract, tiny_clip, tmp_path):
    path = tmp_path / "model"
    make_processor().save_pretrained(path)
    stores = []
    for model in (tiny_clip, changed_weight(tiny_clip)):
        model.save_pretrained(path)
        stores.append(extract(make_dataset(), model=str(path), image_processor=None, device="cpu"))
    assert stores[0].path != stores[1].path
    assert stores[0].metadata["model"]["id"] == str(path)
    assert torch.equal(stores[0].tensor(), extract(make_dataset()).tensor())


# Reading


def test_every_way_of_reading_gives_the_same_rows(extract):
    """In any order: tests/data/test_store.py."""
    store, wanted = extract(make_dataset(), layers=(0, 2), label_column="label"), [3, -1, 22, 0]
    rows = store.tensor(2)
    assert (len(store), store.hidden_size, rows.shape, store.class_names) == (23, 32, (23, 32), ["a", "b", "c"])
    assert store.labels.tolist() == [n % 3 for n in range(23)]
    assert torch.equal(store.take(wanted, layer=-1), rows[wanted])
    assert torch.equal(torch.cat(list(store.iter_batches(5, layer=2))), rows)
    assert torch.equal(pickle.loads(pickle.dumps(store)).take(wanted, layer=2), rows[wanted])
    exported = store.to_dataset(layer=2).with_format("torch")
    assert torch.equal(exported["activation"][:], rows) and torch.equal(exported["label"][:], store.labels)
    assert exported.features["label"].names == ["a", "b", "c"]
    assert extract(make_dataset()).labels is None
    for bad in ([23], [-24]):
        with pytest.raises(IndexError, match=r"must lie in \[-23, 23\)"):
            store.take(bad, layer=2)
    for read in (lambda: store.take([0]), lambda: rows_of(store)):  # by itself, and to train on
        with pytest.raises(ValueError, match=r"holds layers \[0, 2\]: say which"):
            read()
    with pytest.raises(ValueError, match=r"holds layers \[0, 2\], not 1"):
        store.take([0], layer=1)
