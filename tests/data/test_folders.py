"""What a folder of images means: the same files at every door, and the splits and classes that a person would name."""

import io
import os
from pathlib import Path

import datasets
import pandas
import pytest
from image_stores import numbered, numbered_rows, numbers_of, put_tar
from pictures import encoded
from PIL import Image

from hf_vs2.data import load_images
from hf_vs2.registry import dataset_info


def put(root: Path, *names: str) -> Path:
    """Small pictures, all different."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 7 % 256, len(name), 9)).save(root / name, "PNG")
    return root


def found(root: Path, **options) -> dict[str, dict[str, str | None]]:
    """{split: {file below root: class name}}; without classes `None`."""
    try:
        splits = {"": load_images(root, **options)}
    except ValueError as error:
        if "several splits" not in str(error):
            raise
        names = str(error).split("(")[1].split(")")[0].split(", ")
        splits = {name: load_images(root, name, **options) for name in names}
    told = {}
    for name, rows in splits.items():
        classes = getattr(rows.features.get("label"), "names", None)
        told[name or str(rows.split or "train")] = {
            os.path.relpath(row["image"]["path"], root): classes
            and (None if row["label"] == -1 else classes[row["label"]])
            for row in rows
        }
    return told


def classes_by_folder(root: Path, split: str | None = None) -> list[str]:
    return load_images(root, split).features["label"].names


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", "transformers")
    return caplog


# Files, and what they mean: "SPLIT: FILE = CLASS, FILE (without a class); SPLIT: ...". Or "!MESSAGE: FILE, ...".
LAYOUTS = {
    "images": "train: a.png, b.png",
    "split words in names of images": "train: a train.png, test.png, val-2.png",
    "classes": "train: cat/1.png = cat, dog/1.png = dog",
    "a blank at the end of a class": "train: cat/1.png = cat, hot dog /1.png = hot dog",
    "a picture beside classes": "train: cat/1.png = cat, dog/1.png = dog, cover.png",
    "images and one folder of more": "train: a.png, edited/a.png",
    "one class": "train: cat/1.png = cat, cat/2.png = cat",
    "one folder that only holds": "train: images/1.png",
    "splits": "train: train/cat/1.png = cat, train/dog/1.png = dog; test: test/cat/1.png = cat, test/dog/1.png = dog",
    "splits in other letters": "train: Train/1.png; test: TEST/2.png",
    "splits and a picture": (
        "train: train/cat/1.png = cat, train/dog/1.png = dog; test: test/cat/1.png = cat, "
        "test/dog/1.png = dog; left out: cover.png"
    ),
    "splits and a folder": (
        "train: train/cat/1.png = cat, train/dog/1.png = dog; test: test/cat/1.png = cat, "
        "test/dog/1.png = dog; unlabeled: unlabeled/9.png"
    ),
    "splits in a folder": (
        "train: data/train/cat/1.png = cat, data/train/dog/1.png = dog; test: data/test/cat/1.png = cat, "
        "data/test/dog/1.png = dog"
    ),
    "splits in a folder, and a picture": (
        "train: data/train/cat/1.png = cat, data/train/dog/1.png = dog; test: data/test/cat/1.png = cat, "
        "data/test/dog/1.png = dog; left out: cover.png"
    ),
    "splits in each class": (
        "train: cat/train/1.png = cat, dog/train/3.png = dog; test: cat/test/2.png = cat, dog/test/4.png = dog"
    ),
    "splits by a part of the name, twice": (
        "train: seg_train/seg_train/sea/1.png = sea, seg_train/seg_train/street/2.png = street; "
        "test: seg_test/seg_test/sea/3.png = sea; seg_pred: seg_pred/4.png"
    ),
    "a class named train in splits": (
        "train: train/bus/1.png = bus, train/train/2.png = train; test: test/bus/3.png = bus, test/train/4.png = train"
    ),
    "two data sets": (
        "!b/images/1.png: a/train/cat/1.png, a/train/dog/1.png, a/test/cat/1.png, a/test/dog/1.png, b/images/1.png"
    ),
    "test images without classes": "train: train/cat/1.png = cat, train/dog/1.png = dog; test: test/1.png",
    "the same in a folder of a folder": (
        "train: ILSVRC/CLS-LOC/train/cat/1.png = cat, ILSVRC/CLS-LOC/train/dog/1.png = dog; "
        "validation: ILSVRC/CLS-LOC/val/1.png; test: ILSVRC/CLS-LOC/test/1.png"
    ),
    "splits called sets": "train: trainset/cat/1.png = cat, trainset/dog/2.png = dog; test: testset/cat/3.png = cat",
    "a class named train": "train: bus/1.png = bus, train/2.png = train, car/3.png = car",
    "classes that hold split words": "train: bullet_train/1.png = bullet_train, test_tube/2.png = test_tube",
    "train alone": "train: train/cat/1.png = cat, train/dog/1.png = dog",
    "train and a picture": "!cover.png: train/cat/1.png, train/dog/1.png, cover.png",
    "test within other images": "!1.png: 1.png, 2.png, test/3.png",
    "test beside classes": "!cat/1.png: cat/1.png, dog/1.png, test/cat/3.png, test/dog/4.png",
    "class folders in a folder": "train: flowers/rose/1.png = rose, flowers/tulip/2.png = tulip",
    "classes and containers": "train: n1/images/1.png = n1, n2/images/2.png = n2",
    "kinds of classes": "train: animal/cat/1.png = cat, animal/dog/2.png = dog, vehicle/car/3.png = car",
    "kinds of WordNet ids": (
        "train: animals/n01443537/1.png = n01443537, animals/n01641577/2.png = n01641577, "
        "things/n02699494/3.png = n02699494"
    ),
    "years of classes": (
        "train: 2019/cat/1.png = cat, 2019/dog/2.png = dog, 2020/cat/3.png = cat, 2020/dog/4.png = dog"
    ),
    "parts of classes": (
        "train: class X/sub 0/1.png = class X, class X/sub 1/2.png = class X, class Y/sub 0/3.png = class Y"
    ),
    "numbered parts of numbered classes": (
        "train: class 0/sub 0/1.png = class 0, class 0/sub 1/2.png = class 0, class 1/sub 0/3.png = class 1"
    ),
    "more of a class in a folder of it": "train: cat/1.png = cat, cat/more/2.png = cat, dog/3.png = dog",
    "classes at two depths": "train: animal/cat/1.png = cat, animal/dog/2.png = dog, car/3.png = car",
    "a name under two parents": "train: colour/orange/3.png, colour/red/4.png, fruit/apple/2.png, fruit/orange/1.png",
    "years of months": "train: 2019/01/1.png, 2019/02/2.png, 2020/01/3.png",
}


def meaning(layout: str) -> tuple[list[str], dict[str, dict[str, str | None]]]:
    """The files, and what [`found`] tells of them."""
    splits = {}
    for part in layout.split("; "):
        split, files = part.split(": ")
        pairs = [file.partition(" = ") for file in files.split(", ")]
        splits[split] = {file: label or None for file, _, label in pairs}
    files = [file for split in splits.values() for file in split]
    splits.pop("left out", None)
    return files, splits


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_means_what_a_person_would_say(name, tmp_path, said):
    """Splits that are mixed train on test images; classes that are not those of the folders measure nonsense."""
    files, expected = meaning(LAYOUTS[name])
    root = put(tmp_path / "root", *files)
    if LAYOUTS[name].startswith("!"):
        (message,) = expected
        with pytest.raises(ValueError, match=message[1:]):
            load_images(root)
        return
    assert found(root) == expected
    if name in ("a picture beside classes", "splits and a folder"):
        assert found(root, streaming=True) == expected
    read = {file for rows in expected.values() for file in rows}
    for file in set(files) - read:
        assert file in said.text, "left out without a word"
    if all(label is None for rows in expected.values() for label in rows.values()) and "/" in "".join(files):
        nested = any(len(Path(file).parts) > 2 for file in files)
        assert not nested or "no labels are read" in said.text


# Classes


def test_folders_of_numbers_count(tmp_path):
    """Digits and label numbers in the order of letters (0, 1, 10, 2) are other labels than the names say."""
    numbers = put(tmp_path / "numbers", *(f"{number}/a.png" for number in range(12)))
    assert classes_by_folder(numbers) == [str(number) for number in range(12)]
    assert [row["label"] for row in load_images(numbers)] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    names = put(tmp_path / "names", "10_cat/a.png", "9_dog/b.png")
    assert classes_by_folder(names) == ["10_cat", "9_dog"]


def test_tiny_imagenet_as_it_is_published(tmp_path, said):
    """Each class has a folder `images`; classes of validation images are in a file, those of test images nowhere."""
    root = put(
        tmp_path / "tiny-imagenet-200",
        *(f"train/{name}/images/{name}_{i}.JPEG" for name in ("n01443537", "n01641577", "n01644900") for i in (0, 1)),
        *(f"val/images/val_{i}.JPEG" for i in range(4)),
        "test/images/test_0.JPEG",
    )
    boxes = "\t0\t32\t44\t62\n"
    (root / "val/val_annotations.txt").write_text(
        f"val_0.JPEG\tn01644900{boxes}val_1.JPEG\tn01443537{boxes}val_2.JPEG\tn01641577{boxes}"
    )
    words = {
        "n01443537": "goldfish, Carassius auratus",
        "n01641577": "frog, bullfrog",
        "n01644900": "frog, tailed frog",
    }
    (root / "words.txt").write_text("".join(f"{name}\t{word}\n" for name, word in words.items()))
    names = ["goldfish", "frog, bullfrog", "frog, tailed frog"]
    train, val = load_images(root, "train"), load_images(root, "validation")
    assert train.features["label"].names == val.features["label"].names == names
    assert train["label"][:] == [0, 0, 1, 1, 2, 2] and val["label"][:] == [2, 0, 1, -1]
    assert set(load_images(root, "test").features) == {"image"}
    alone = load_images(root / "val")
    assert alone.features["label"].names == names and alone["label"][:] == [2, 0, 1, -1]
    # The registry knows ids: its entry reads the same folder.
    info = dataset_info({"name": "tiny_imagenet", "path": str(root), "test_split": "validation"})
    assert info.class_names(info.load("train")) == ["goldfish", "American bullfrog", "tailed frog"]


# Files


def test_an_unreadable_folder_stops_or_is_left_out(tmp_path, said):
    """A class that the system hides must not be missing without a word."""
    root = put(tmp_path / "root", "cat/1.png", "dog/2.png")

    class NoDogs:
        """What a user without permission meets; tests may run as root, who has it."""

        def __call__(self, folder):
            if str(folder).rstrip("/").endswith("dog"):
                raise PermissionError(13, "Permission denied", str(folder))
            return scandir(folder)

    scandir = os.scandir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", NoDogs())
        with pytest.raises(PermissionError, match="dog/ may not be listed"):
            load_images(root)
        assert len(load_images(root, on_error="skip")) == 1
    assert "1 folder without permission" in said.text


# Files that hold images, and lists of paths


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_are_read_whatever_lies_beside_them(streaming, tmp_path, said):
    """Notes, statistics and a preview lie beside most data sets; names of labels are the same in both splits."""
    numbered_rows(["dog", "10"]).to_parquet(tmp_path / "train.parquet")
    numbered_rows(["bird", "dog"], first=9).to_parquet(tmp_path / "my test [1].parquet")
    numbered_rows(["cat"], first=30).to_parquet(tmp_path / "more.parquet")
    (tmp_path / "README.md").write_text("# Birds\n\nNo configs: here.\n")
    for name in ("notes.txt", "stats.json", "labels.csv", "thumb.png"):
        (tmp_path / name).write_bytes(b'{"a": 1}\n')
    train, test, more = (load_images(tmp_path, split, streaming=streaming) for split in ("train", "test", "more"))
    assert train.features["label"].names == test.features["label"].names == ["10", "bird", "cat", "dog"]
    assert [numbers_of(rows) for rows in (train, test, more)] == [[0, 1], [9, 10], [30]]
    assert [row["label"] for row in test] == [1, 3]
    assert "1 .png file" in said.text


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_with_class_names_in_another_order_keep_their_own(streaming, tmp_path):
    """`datasets` gives all splits the features of one: each cat of the other would be a dog."""
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        content = {"image": [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(2)], "label": [0, 1]}
        datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / f"{split}.parquet")
        rows = load_images(tmp_path / f"{split}.parquet", streaming=streaming)
        assert rows.features["label"].names == names
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        rows = load_images(tmp_path, split, streaming=streaming)
        assert (rows.features["label"].names, [row["label"] for row in rows]) == (names, [0, 1])


def test_numbers_in_one_list_and_words_in_another_are_the_same_labels(tmp_path):
    """Class 1 must not be 1 in one split and 0 in the other; in two files of one split it ended in an error."""
    put(tmp_path, "1.png", "2.png")
    for folder, names in (("splits", ("train", "test")), ("one", ("train-0", "train-1"))):
        (tmp_path / folder).mkdir()
        for name, last in zip(names, ("2", "unknown"), strict=True):
            (tmp_path / folder / f"{name}.csv").write_text(f"file_name,label\n../1.png,1\n../2.png,{last}\n")
    for folder, split, labels in (
        ("splits", "train", [0, 1]),
        ("splits", "test", [0, 2]),
        ("one", None, [0, 1, 0, 2]),
    ):
        rows = load_images(tmp_path / folder, split)
        assert (rows.features["label"].names, rows["label"][:]) == (["1", "2", "unknown"], labels)


LISTS = {
    "a.csv": "image,label\ncat/1.png,cat\ndog/2.png,None\n",
    "bom.csv": "\ufefffile_name,label\ncat/1.png,cat\ndog/2.png,None\n",
    "excel.csv": 'Path;Label;label\ncat/1.png;"a;b";cat\n./dog/2.png;x;None\n',
    "clip.csv": "filepath\ttitle\tlabel\ncat/1.png\ta cat, asleep\tcat\ndog/2.png\ta dog, running\tNone\n",
    "blanks.csv": "file_name, label\ncat/1.png, cat\ndog/2.png, None\n",
    "b.tsv": "label\tfilename\ncat\tcat/1.png\nNone\tdog/2.png\n",
    "c.jsonl": '{"image_path": "cat/1.png", "label": "cat"}\n{"image_path": "dog/2.png", "label": "None"}\n',
    "d.json": '[{"img": "cat/1.png", "label": "cat"}, {"img": "dog/2.png", "label": "None"}]',
    "e.parquet": "file_name,label\ncat/1.png,cat\ndog/2.png,None\n",
    "metadata.csv": "file_name,label\ncat/1.png,cat\ndog/2.png,None\n",
    "metadata.jsonl": '{"file_name": "cat/1.png", "label": "cat"}\n{"file_name": "dog/2.png", "label": "None"}\n',
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_paths_is_a_data_set(name, streaming, tmp_path, monkeypatch):
    """People have lists of images from whatever program; a class may be called None."""
    put(tmp_path / "set", "cat/1.png", "dog/2.png")
    if name.endswith(".parquet"):
        pandas.read_csv(io.StringIO(LISTS[name]), keep_default_na=False).to_parquet(tmp_path / "set" / name)
    else:
        (tmp_path / "set" / name).write_text(LISTS[name], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    metadata = name.startswith("metadata")
    for source in (f"set/{name}", *(["set"] if metadata else [])):
        rows = load_images(source, streaming=streaming)
        assert rows.features["image"] == datasets.Image(decode=False)
        assert rows.features["label"].names == ["None", "cat"]
        told = [(row["image"]["path"], row["label"]) for row in rows]
        assert told == [(str(tmp_path / "set/cat/1.png"), 1), (str(tmp_path / "set/dog/2.png"), 0)]


def test_a_list_may_name_images_elsewhere_but_metadata_may_not(tmp_path):
    """A downloaded data set must not read what else is on the disk."""
    put(tmp_path, "images/1.png", "set/2.png")
    rows = f"file_name\n../images/1.png\n{tmp_path}/images/1.png\n"
    (tmp_path / "set/list.csv").write_text(rows)
    assert [row["image"]["path"] for row in load_images(tmp_path / "set/list.csv")] == [
        str(tmp_path / "images/1.png")
    ] * 2
    (tmp_path / "set/metadata.csv").write_text(rows)
    with pytest.raises(ValueError, match=r"metadata.csv names '../images/1.png': expected a path inside"):
        load_images(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "cat/1.png,cat\ncat/1.png,cat\n", "no column of paths.*it has cat/1.png, cat"),
        ("a.csv", "image,label\n", "a.csv cannot be opened: it holds no rows"),
        ("a.csv", "image,label\ncat/1.png,tabby, grey\n", "a.csv: its rows have more fields than its first line"),
        ("a.tar", "no archive" * 99, "a.tar cannot be opened"),
        (
            "a.csv",
            "image,label\nelsewhere/1.png,cat\n",
            "names no file that is there: .*paths count from the folder of the list",
        ),
        ("a.csv", "image,label\ncat/1.png,caf\xe9\n".encode("latin-1"), "a.csv cannot be opened: 'utf-8'"),
        ("a.csv", "image\n1.png\n".encode("utf-16"), "a.csv cannot be opened: 'utf-8'"),
        ("a.jsonl", "{'image': 1}", "a.jsonl cannot be opened"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(name, text, expected, tmp_path):
    put(tmp_path, "cat/1.png")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=expected):
        load_images(tmp_path / name)


def test_metadata_keeps_the_splits_of_its_images(tmp_path, said):
    """One table at the top or one in each split: a row belongs where its image lies; labels are the same in both."""
    for name in ("top", "each"):
        root = put(tmp_path / name, "train/1.png", "train/2.png", "test/3.png", "test/unnamed.png")
        if name == "top":
            rows = "train/1.png,b\ntest/3.png,a\ntrain/2.png,c\n"
            (root / "metadata.csv").write_text(f"file_name,label\n{rows}")
        else:
            (root / "train/metadata.csv").write_text("file_name,label\n1.png,b\n2.png,c\n")
            (root / "test/metadata.csv").write_text("file_name,label\n3.png,a\n")
        assert found(root) == {"train": {"train/1.png": "b", "train/2.png": "c"}, "test": {"test/3.png": "a"}}
        assert load_images(root, "test")["label"][:] == [0]
        assert "1 .png file" in said.messages[-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_as_clip_benchmark_writes_it(streaming, tmp_path):
    """Shards by split, labels in `.cls`, their names in a text file."""
    for split, first in (("train", 0), ("test", 50)):
        for shard in range(2):
            numbers = range(first + 2 * shard, first + 2 * shard + 2)
            members = {
                f"s{n}.{key}": value
                for n in numbers
                for key, value in (("png", encoded(numbered(n))), ("cls", str(n % 2).encode()))
            }
            put_tar(tmp_path / split / f"{shard}.tar", members)
        (tmp_path / split / "nshards.txt").write_text("2")
    (tmp_path / "classnames.txt").write_text("cat\nhot dog\n")
    for source, split in ((tmp_path, "test"), (tmp_path / "test", None), (tmp_path / "test/0.tar", None)):
        rows = load_images(source, split, streaming=streaming)
        assert rows.features["label"].names == ["cat", "hot dog"]
        expected = [50, 51] if source.suffix else [50, 51, 52, 53]
        assert [row["image"]["bytes"] for row in rows] == [encoded(numbered(n)) for n in expected], (
            "as they are in the archive"
        )
        assert numbers_of(rows) == expected and [row["label"] for row in rows] == [n % 2 for n in expected]
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        load_images(tmp_path, streaming=streaming)


def test_the_page_holds_the_table_of_the_function():
    """One table says what a folder means: two that differ would each be believed."""
    table = [line.strip() for line in load_images.__doc__.splitlines() if line.strip().startswith("|")]
    page = (Path(__file__).parents[2] / "docs/datasets.md").read_text(encoding="utf-8")
    assert len(table) > 10 and "\n".join(table) in page
