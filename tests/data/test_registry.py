"""Data sets by name: what the entries hold, and that no label is ever given another class's name."""

import ast
import random
import re
import runpy
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from hf_vs2.data.labels.prompts import clean_class_names, resolve_templates
from hf_vs2.data.registry import DatasetInfo, available, dataset_info


DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"
COUNTS = {
    "aircraft": 100,
    "caltech101": 102,
    "cifar10": 10,
    "cifar100": 100,
    "cub200": 200,
    "eurosat": 10,
    "flowers102": 102,
    "food101": 101,
    "imagenet": 1000,
    "sun397": 397,
    "tiny_imagenet": 200,
}
# Radford et al. 2021, table 9.
MEAN_PER_CLASS = {"aircraft", "caltech101", "flowers102"}
CLIP_SECTIONS = {
    "aircraft": "FGVCAircraft",
    "caltech101": "Caltech101",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "eurosat": "EuroSAT",
    "flowers102": "Flowers102",
    "food101": "Food101",
    "sun397": "SUN397",
}


def labelled(names: list[str] | None, labels: list | None = None, column: str = "label") -> datasets.Dataset:
    """A data set of labels alone, named or not."""
    labels = labels if labels is not None else list(range(len(names or [])))
    if names is None:
        return datasets.Dataset.from_dict({column: labels})
    features = datasets.Features({column: datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({column: labels}, features=features)


def names_of(info: DatasetInfo, label_names: list[str]) -> list[str]:
    return info.class_names(labelled(label_names, column=info.label_column))


def test_entries_are_complete():
    """Two classes with one name, a broken prompt or the wrong metric would falsify every figure of a data set."""
    assert {name: len(dataset_info(name).classes) for name in available()} == COUNTS
    for name in available():
        info = dataset_info(name)
        names = list(info.classes.values())
        assert clean_class_names(names) == names
        assert resolve_templates(info.templates) == info.templates
        assert (info.metric == "mean_per_class") == (name in MEAN_PER_CLASS)
        assert set(info.aliases.values()) <= set(names)
        assert info.pitfalls and info.sources and info.verification


@pytest.mark.parametrize("name", CLIP_SECTIONS)
def test_names_and_prompts_are_those_clip_published(name, shared_data):
    """Figures are compared with CLIP's and the paper's, which used these words."""
    text = (shared_data / "clip_prompts.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {CLIP_SECTIONS[name]}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    classes, templates = (ast.literal_eval(found) for found in re.findall(r"^\w+ = (\[.*?^\])", section, re.M | re.S))
    info = dataset_info(name)
    assert sorted(info.classes.values()) == sorted(" ".join(one.split()) for one in classes)
    assert list(info.templates) == templates


@pytest.mark.parametrize("name", COUNTS)
def test_names_follow_the_labels_in_any_order(name):
    """A copy that numbers its classes in another order must not get its neighbours' names."""
    info = dataset_info(name)
    labels = list(info.classes)
    random.Random(0).shuffle(labels)
    right = [info.classes[label] for label in labels]
    assert names_of(info, labels) == right
    assert names_of(info, right) == right
    if name != "imagenet":  # which tells a dog from a jacket by case alone
        disguised = [f"{i:03}.{label.upper().replace('_', '-')}" for i, label in enumerate(right)]
        assert names_of(info, disguised) == right


@pytest.mark.parametrize(
    ("name", "labels", "names"),
    [
        ("cifar100", ["cra", "apple"], ["crab", "apple"]),
        ("cub200", ["Laysan Albatross", "001.Black_footed_Albatross"], ["Laysan Albatross", "Black footed Albatross"]),
        ("sun397", ["/a/apse/indoor", "/b/bakery/shop"], ["apse indoor", "bakery shop"]),
        ("caltech101", ["BACKGROUND_Google", "Faces", "airplanes"], ["background", "off-center face", "airplane"]),
        ("eurosat", ["Herbaceous Vegetation", "SeaLake"], ["brushland or shrubland", "lake or sea"]),
        ("flowers102", ["pink-yellow dahlia", "ball moss"], ["pink and yellow dahlia", "air plant"]),
        ("tiny_imagenet", ["n02666347", "n02123045", "monarch"], ["abacus", "tabby cat", "monarch butterfly"]),
        ("tiny_imagenet", ["n02666196"], ["abacus"]),
        ("imagenet", ["n02012849", "crane2"], ["crane bird", "construction crane"]),
        ("imagenet", ["Cardigan, Cardigan Welsh corgi", "cardigan"], ["Cardigan Welsh Corgi", "cardigan"]),
        ("imagenet", ["projectile, missile", "missile"], ["projectile", "missile"]),
    ],
)
def test_label_names_of_known_copies(name, labels, names):
    """The Hub's copies and the original folders each spell their labels in their own way."""
    assert names_of(dataset_info(name), labels) == names


def test_label_names_that_do_not_match():
    """A wrong data set under a known name must be noticed; its own names are used only when asked for."""
    info = dataset_info("eurosat")
    with pytest.raises(ValueError, match=r"2 of 3 label names.*'cat', 'black dog'.*aliases.*classes: null"):
        names_of(info, ["Forest", "cat", "black dog"])
    own = info.replace(classes=None)
    assert names_of(own, ["Forest", "001.cat", "black_dog"]) == ["Forest", "cat", "black dog"]
    # a word that several classes share is none of them
    cranes = info.replace(classes={"crane, Grus": "crane bird", "crane, derrick": "construction crane"})
    assert names_of(cranes, ["derrick", "grus"]) == ["construction crane", "crane bird"]
    with pytest.raises(ValueError, match="1 of 1 label names.*'crane'"):
        names_of(cranes, ["crane"])
    with pytest.raises(ValueError, match="'forest' twice"):
        names_of(info, ["Forest", "FOREST"])


def test_labels_without_names_take_the_order_only_when_they_fit():
    """Numbers alone cannot show a wrong order, so a count that differs must stop the run."""
    info = dataset_info({"name": "shapes", "path": "shapes/", "classes": ["square", "circle", "star"]})
    assert info.class_names(labelled(None, [2, 0, 1, 1])) == ["square", "circle", "star"]
    for labels in ([0, 1], [1, 2, 3], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=f"{len(labels)} from {labels[0]} to {labels[-1]}.*not 0 to 2"):
            info.class_names(labelled(None, labels))
    assert info.class_names(labelled(None, ["star", "circle", "star"])) == ["circle", "star"]  # a column of names
    with pytest.raises(ValueError, match="no label names: give `classes`"):
        info.replace(classes=None).class_names(labelled(None, [0, 1]))


def test_a_folder_stands_in_for_the_hub(tmp_path):
    """The whole way offline: folders of images, a slice as split, names by the folders' names."""
    for split, count in (("train", 3), ("test", 1)):
        for folder in ("River", "AnnualCrop", "Forest"):
            (tmp_path / split / folder).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / split / folder / f"{i}.png")
    info = dataset_info({"name": "eurosat", "path": str(tmp_path), "train_split": "train[2:7]"})
    train = info.load("train")
    names = info.class_names(train)
    seen = [(Path(row["image"]["path"]).parent.name, names[row["label"]]) for row in train]
    assert [folder for folder, _ in seen] == ["AnnualCrop", "Forest", "Forest", "Forest", "River"]
    assert all(dataset_info("eurosat").classes[folder] == name for folder, name in seen)
    assert len(info.load("test")) == 3

    with pytest.raises(ValueError, match="no column 'kind'; it has image, label"):
        info.replace(label_column="kind").load("test")
    with pytest.raises(ValueError, match="no column 'img'.*it has image, label"):
        info.replace(image_column="img").load("test")
    with pytest.raises(ValueError, match="neither 'train' nor 'test'"):
        info.load("train[:2]")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        info.replace(path=f"{tmp_path}/nowhere/eurosat").load("test")


def test_entries_of_ones_own(tmp_path):
    """A few lines are enough, the rest has defaults, and a file says the same as a dictionary."""
    info = dataset_info({"name": "mybirds", "path": "birds/", "templates": ["a {}, a type of bird."]})
    assert info == DatasetInfo(name="mybirds", source_id="birds/", templates=("a {}, a type of bird.",))
    assert (info.title, info.train_split, info.test_split) == ("mybirds", "train", "test")
    file = tmp_path / "mybirds.yaml"
    file.write_text("path: birds/\ntemplates: ['a {}, a type of bird.']\n")
    assert dataset_info(str(file)) == info

    mine = dataset_info({"name": "imagenet", "path": "in1k/", "test_split": "validation[:600]"})
    assert (mine.source_id, mine.test_split, mine.train_split) == ("in1k/", "validation[:600]", "train")
    assert mine.classes == dataset_info("imagenet").classes
    # a local path has no revision, and `load_images` refuses one
    pinned = dataset_info({"name": "cifar10", "revision": "abc", "config_name": "plain_text"})
    moved = pinned.replace(path="cifar10/")
    assert (pinned.source_id, pinned.revision, moved.revision, moved.config_name) == (
        "uoft-cs/cifar10",
        "abc",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar1000", r"comes with the package \(aircraft, .*Did you mean 'cifar100'\?"),
        ({"name": "food102"}, "Did you mean 'food101'"),
        ({"name": "cifar10", "image_colum": "image"}, "no setting 'image_colum'; did you mean 'image_column'"),
        ({"name": "a", "path": "b", "hub_id": "c"}, "both path and hub_id"),
        ({"path": "birds/"}, "does not say its name"),
        ({"name": "a", "path": ""}, "does not say its path"),
        ({"name": "a", "path": "b", "metric": "f1"}, "metric='f1' is not known; use one of accuracy, mean_per_class"),
        ({"name": "a", "path": "b", "templates": ["bird"]}, "no {} where the class name goes"),
        ({"name": "a", "path": "b", "templates": None}, "is empty"),
        ({"name": "a", "path": "b", "classes": "cat"}, "classes must be a list of names"),
        ({"name": "a", "path": "b", "classes": yaml.safe_load("[yes, no]")}, "True, which YAML .* put it in quotes"),
        ({"name": "a", "path": "b", "test_split": 3}, "test_split must be a text, not 3"),
        ({"name": "cifar10", 3: 4}, "no setting '3'"),
    ],
)
def test_bad_entries_are_refused(spec, message):
    """A typing error must not become a silent default."""
    with pytest.raises(ValueError, match=message):
        dataset_info(spec)


def test_bad_files_are_named(tmp_path):
    """A file that is not there, no YAML or no mapping is named."""
    file = tmp_path / "birds.yaml"
    with pytest.raises(FileNotFoundError, match=r"birds\.yaml"):
        dataset_info(str(file))
    for content, message in (("a: [", "is not a YAML file"), ("- a\n- b\n", "must hold `key: value` lines")):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"birds\.yaml {message}"):
            dataset_info(str(file))


def test_real_copies(shared_data):
    """Three copies with labels in plain words get CLIP's names, each the name of its own class."""
    expected = {}
    imagenet, tiny = dataset_info("imagenet"), dataset_info("tiny_imagenet")
    ids = sorted(one for one in {*tiny.classes, *tiny.aliases} if one in imagenet.aliases)
    # This copy counts the original WordNet ids in order.
    expected["tiny_imagenet"] = [imagenet.aliases[one].replace("projectile", "missile") for one in ids]
    for name, folder in (("cifar10", "cifar10"), ("tiny_imagenet", "tiny-imagenet"), ("cub200", "cub100")):
        info = dataset_info(
            {"name": name, "path": str(shared_data / folder), "image_column": "image", "test_split": "test[:50]"}
        )
        test = info.load("test")
        assert len(test) == 50
        assert info.class_names(test) == expected.get(name, test.features["label"].names)


def test_documented_table_and_examples(capsys):
    """The page shows what the package holds, and its examples work when they are copied."""
    text = DOCS.read_text(encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="hf_vs2.data.registry"):  # it is imported already
        runpy.run_module("hf_vs2.data.registry", run_name="__main__")
    assert "python -m hf_vs2.data.registry" in text
    assert text.endswith(capsys.readouterr().out)
    examples = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    infos = [dataset_info(example) for example in examples]
    assert [info.source_id for info in infos] == ["data/cifar10", "birds/", "shapes/"]
    assert names_of(infos[2], ["ci_01", "sq_01"]) == ["blue circle", "red square"]
