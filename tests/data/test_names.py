"""Names of labels: one list means the same to every command and function that takes it."""

import shutil
import unicodedata

import datasets
import pytest
import torch
from commands import COLOURS, complaint, run
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

import hf_vs2
from hf_vs2.data.labels.lists import names_in
from hf_vs2.data.labels.names import (
    clean_class_names,
    match_names,
    names_by_place,
    read_labels,
    sorted_names,
    with_numbered_labels,
)
from hf_vs2.evaluation.comparison import evaluate


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


# Matching: names of the data set, names given, and for each class of the data set the name that it gets, or what the
# message says.


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (["bird", "cat", "dog"], ["bird", "cat", "dog"], ["bird", "cat", "dog"]),
        (["bird", "cat", "dog"], ["dog", "bird", "cat"], ["bird", "cat", "dog"]),
        (["cat", "dog"], ["ape", "dog", "elk", "cat"], ["cat", "dog"]),
        (["Night_Bird", "oak-tree"], ["oak tree", "night bird"], ["night bird", "oak tree"]),
        (["caf\u00e9"], ["cafe\u0301", "cafe"], ["cafe\u0301"]),
        (["001.Black_footed_Albatross"], ["black footed albatross"], ["black footed albatross"]),
        (["Black footed Albatross"], ["001.Black_footed_Albatross"], ["001.Black_footed_Albatross"]),
        (["01_cat", "2) dog", "n02085620-Chihuahua"], ["chihuahua", "dog", "cat"], ["cat", "dog", "chihuahua"]),
        (["tabby"], ["tabby, tabby cat", "dog"], ["tabby, tabby cat"]),
        (["cardigan", "Cardigan"], ["Cardigan", "cardigan"], ["cardigan", "Cardigan"]),
        (["C", "C++", "C#"], ["c#", "c++", "c"], ["c", "c++", "c#"]),
        (["707-320", "737-200"], ["737-200", "707-320"], ["707-320", "737-200"]),
        # numbers
        (["0", "1", "10", "2"], DIGITS, ["zero", "one", "ten", "two"]),
        (["00", "01", "02"], ["zero", "one", "two"], ["zero", "one", "two"]),
        (["1", "2", "3"], ["one", "two", "three"], ["one", "two", "three"]),
        (["9", "10", "8"], ["eight", "nine", "ten"], ["nine", "ten", "eight"]),
        (["1", "02"], ["2", "01", "7"], ["01", "2"]),
        # a mapping
        (["n02123045", "n02666196"], {"n02666196": "abacus", "n02123045": "tabby"}, ["tabby", "abacus"]),
        (["cat", "dog"], {"0": "dog", "1": "cat"}, ["cat", "dog"]),
        (["1", "0"], {"0": "zero", "1": "one"}, ["one", "zero"]),
        # what does not fit
        (
            ["bird", "cat", "dog"],
            ["bird", "cat"],
            r"3 classes.*bird, cat, dog.*2 labels given \(bird, cat\).*no label for dog",
        ),
        (["blue", "red"], ["navy", "scarlet"], r'no label for blue, red.*\{"blue": "other name"\}'),
        (["cat"], ["Cat", "CAT"], "no label for cat"),
        (["cat", "CAT"], ["Cat", "dog"], "'Cat' is the label of cat, CAT"),
        (["\U0001f600"], ["\U0001f60e"], "no label"),
        (["1", "2"], ["zero", "one", "two"], "no label for 1, 2"),
        (["0", "5"], ["zero", "one", "two"], "no label for 0, 5"),
        (["cat", "dog"], {"cat": "kitten"}, "no label for dog"),
    ],
)
def test_classes_are_matched_by_name(own, given, expected):
    """By position, two class folders and ten names measured 0.00 %, and no error said so."""
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            match_names(own, given)
        return
    found = match_names(own, given)
    assert [found.names[place] for place in found.places] == expected
    assert found.names == names_in(given)
    for mine, name in zip(own, expected, strict=True):
        assert mine in found.told and name in found.told
    for name in set(found.names) - set(expected):
        assert f"all the same: {name}" in found.told or f", {name}" in found.told


def test_numbers_without_names_count_places():
    """Labels of earlier stores have no names; a mapping must be of just those numbers."""
    assert names_by_place(["a", "b"]) == names_by_place({"1": "b", "0": "a"}) == ["a", "b"]
    with pytest.raises(ValueError, match="numbers without names.*those given are for 1, 2"):
        names_by_place({"1": "a", "2": "b"})
    assert sorted_names(["10", "9", "9", "1"]) == ["1", "9", "10"]
    assert sorted_names(["b", "10", "9"]) == ["10", "9", "b"]


# Files and command lines


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("l.txt", "\ufeffcat\r\n\n  hot dog \n", ["cat", "hot dog"]),
        ("l", "tench, Tinca tinca\ncock\n", ["tench, Tinca tinca", "cock"]),
        ("l.json", '["cat", "bird,dog"]', ["cat", "bird,dog"]),
        ("l.json", '["bird,dog"]', ["bird,dog"]),
        ("l.json", '{"1": "dog", "0": "cat", "10": "elk"}', {"0": "cat", "1": "dog", "10": "elk"}),
        ("l.csv", "name\ncat\n\n dog \n", ["cat", "dog"]),
        ("l.csv", "id,name\r\n1,dog\r\n0,cat\r\n", {"0": "cat", "1": "dog"}),
        ("l.csv", 'Class Name;folder\n"tench; Tinca";n01\ncock;n02\n', {"n01": "tench; Tinca", "n02": "cock"}),
        ("l.csv", "label,category,size\n0,cat,3\n1,dog,4\n", {"0": "cat", "1": "dog"}),
        ("l.csv", "class,kind\ncat,pet\ndog,pet\n", ["cat", "dog"]),
        ("l.tsv", "label\tname\ncat\tcat, small\n", {"cat": "cat, small"}),
        # what is refused, and what the message says beside the file's name
        ("l.csv", "cat\ndog\n", "name its columns in the first line.*'cat'.*txt"),
        ("l.csv", "name\ntench, Tinca tinca\n", "row 1 is.*in quotes"),
        ("l.csv", "id,name\n0,\n", "row 1 is"),
        ("l.csv", 'name\n"cat\ndog\n', "is not a table"),
        ("l.json", '{"cat": 0}', "a list of texts"),
        ("l.json", "cat\n", "is not JSON"),
        ("l.json", '{"a": "cat", "b": "elk", "a": "dog"}', "is not JSON: 'a' stands twice"),
        ("l.yaml", "- cat\n", r"expected .txt, .csv, .tsv, .json"),
        ("l.txt", "\n\n", "is empty"),
        ("l.txt", "bird, dog\n", "one label, or several.*--labels bird dog.*one a line"),
        ("l.txt", "'bird',\n'dog'\n", "one label, or several"),
        ("l.txt", "caf\u00e9\n".encode("latin-1"), "not UTF-8 text.*Latin-1.*iconv"),
        ("l.csv", "name\ncaf\u00e9\n".encode("utf-16"), "not UTF-8 text.*UTF-16.*iconv"),
        ("l.json", '["cat"]'.encode("utf-16-le"), "not UTF-8 text.*UTF-16"),
    ],
)
def test_files_of_labels(name, content, expected, tmp_path):
    """A header as a first label shifts every class by one; a JSON list was one label; a file in Latin-1 was not
    named."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if not isinstance(expected, str):
        found = read_labels([str(file)])
        assert found == expected and list(found) == list(expected)
        return
    with pytest.raises(ValueError, match=rf"{name}.*{expected}"):
        read_labels([str(file)])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["cat", "hot\ndog"], ["cat", "hot dog"]),
        (["St. Bernard"], ["St. Bernard"]),
        (["TV/monitor", "/a/apse/indoor", "node.js"], ["TV/monitor", "/a/apse/indoor", "node.js"]),
        (["tench, Tinca tinca", "cock"], ["tench, Tinca tinca", "cock"]),
        (["labls.txt"], "no such file; did you mean labels.txt"),
        (["./mine"], "no such file"),
        (["cat", "dog.csv"], "dog.csv: there is no such file"),
        (["labels.txt", "labels.txt"], "give a file of labels alone"),
        (["bird,dog"], r"is that one label, or several.*--labels bird dog.*\[\"bird,dog\"\]"),
        (["bird,dog", "cat"], "one label, or several"),
        (["bird,", "dog"], "one label, or several"),
        (["hot dog|cat"], "--labels 'hot dog' cat"),
        (["cat\ndog"], "--labels cat dog"),
    ],
)
def test_labels_on_the_command_line(values, expected, tmp_path, monkeypatch):
    """A file that is not there, and a list in one word, became the only label, with a score of 1.000."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    if isinstance(expected, list):
        assert read_labels(values) == expected
        return
    with pytest.raises(ValueError, match=expected):
        read_labels(values)


# One prompt to CLIP


@pytest.fixture(scope="module")
def lit(shared_data):
    """CLIP's own tokenizer, and a text tower for it."""
    path = shared_data / "clip-vit-tiny-lit"
    return CLIPModel.from_pretrained(path), CLIPTokenizer.from_pretrained(path)


LONG = "very " * 90


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Cardigan", "cardigan"),
        ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")),
        ("hot dog", "hot\u00a0dog"),
        ("hot  dog", "hot dog"),
        ("cat", "cat "),
        ("night_bird", "night bird"),
        ("001.cat", "cat"),
        (LONG + "cat", LONG + "dog"),
        ("<|endoftext|>cat", "<|endoftext|>dog"),
    ],
)
def test_names_that_are_one_to_clip_are_refused(one, other, lit):
    """Each would get half of the score, and in `evaluate` the second class would never be answered."""
    with pytest.raises(ValueError) as error:
        hf_vs2.class_embeddings(*lit, [one, "tree", other])
    assert all(repr(name)[-12:] in str(error.value) for name in (one, other))
    assert len(hf_vs2.class_embeddings(*lit, [one, "tree"])) == 2


# The names of a data set


def test_labels_of_a_store_are_matched_by_name(checkpoint, images_path, tmp_path, capsys):
    """In another order, with more names, or from a file: the same accuracy, shown with what was matched; what does not
    fit is refused before any image is read."""
    arguments = ["evaluate", "--checkpoint", checkpoint, "--dataset", images_path, "--split", "test", "--disable_tqdm"]
    arguments += ["--output", tmp_path / "r.json", "--templates", "single", "--method", "vs2"]

    def measured(*labels):
        run(capsys, *arguments, *labels)
        result = hf_vs2.EvaluationResult.from_json(tmp_path / "r.json")
        accuracy = result.per_class["accuracy"][result.index("vs2", "single")]
        return dict(zip(result.per_class["class_names"], accuracy, strict=True))

    own = measured()
    assert measured("--labels", "red", "Blue", "green") == {
        name if name != "blue" else "Blue": own[name] for name in own
    }
    more = measured("--labels", "red", "blue", "green", "violet")
    assert more["violet"] is None and set(more) == {*own, "violet"}
    message = complaint(capsys, *arguments, "--labels", "red", "blue", "--activations_dir", tmp_path / "none")
    assert "3 classes" in message and "no label for green" in message and not (tmp_path / "none").exists()

    classifier = hf_vs2.zero_shot_classifier(str(checkpoint), device="cpu")
    model, tokenizer = classifier.model, classifier.tokenizer
    rows = hf_vs2.extract_activations(
        model.clip, hf_vs2.load_images(images_path, "test"), tmp_path, label_column="label", progress=False
    )
    orders = (sorted(COLOURS), ["red", "violet", "green", "blue"])
    found = []
    for names in orders:
        embeds = hf_vs2.class_embeddings(model.clip, tokenizer, names)
        found.append(hf_vs2.recommend(model, rows, embeds, rows.labels, class_names=names).candidates[0])
    plain = evaluate(model, rows, rows.labels, orders[1], tokenizer, templates="single", methods=["vs2"])
    assert found[1]["top1"] == pytest.approx(plain.row("clip", "single")["top1"], abs=1e-3)
    with pytest.raises(ValueError, match="3 classes in the store and 4 class embeddings"):
        hf_vs2.recommend(model, rows, embeds, rows.labels)
    ours = torch.randint(0, 4, (len(rows),))  # labels of one's own count places in one's own names
    assert evaluate(model, rows, ours, orders[1], tokenizer, templates="single", methods=["vs2"]).labels.equal(ours)


def test_a_column_of_names_is_read_as_labels(checkpoint, images_path, tmp_path, capsys):
    """A metadata.csv with a column of names needs no step in Python."""
    folder = tmp_path / "d"
    folder.mkdir()
    lines = ["file_name,colour"]
    for number, name in enumerate(["red", "blue", "red", ""] * 6):
        shutil.copy(images_path / "test" / (name or "green") / "00.png", folder / f"{number}.png")
        lines.append(f"{number}.png,{name}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    images = hf_vs2.load_images(folder)
    labelled = with_numbered_labels(images, "colour")
    assert labelled.features["colour"].names == ["blue", "red"] and labelled["colour"][:4] == [1, 0, 1, None]
    assert labelled["image"][:] == images["image"][:] and with_numbered_labels(labelled, "colour") is labelled
    given = ["--checkpoint", checkpoint, "--dataset", folder, "--activations_dir", tmp_path / "rows", "--disable_tqdm"]
    out = run(capsys, "recommend", *given, "--label_column=colour", "--labels", "red", "green", "blue")
    assert "On 18 labelled images" in out


def test_numbering_is_cleaned_or_named(caplog):
    """`a photo of a 001.Black footed Albatross.` costs points; other numbers may belong to a name, so they are only
    pointed at."""
    given, cleaned = ["001.Black_footed_Albatross", " /a/apse\u00a0 indoor"], ["Black footed Albatross", "apse indoor"]
    assert clean_class_names(given) == cleaned
    assert clean_class_names(["001.a_b", "c"], clean=False) == ["001.a_b", "c"]
    assert clean_class_names(["747_400", "8-ball"]) == ["747 400", "8-ball"]
    assert "begin with a number ('747 400', '8-ball'" in caplog.text


def test_datasets_keep_their_split_and_order(tmp_path):
    """What is added in place of the names must not reorder a selection of rows."""
    images = [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in range(4)]
    for one in images:
        Image.new("RGB", (4, 4)).save(one["path"])
    whole = datasets.Dataset.from_dict(
        {"image": images, "label": ["10", "9", "10", "2"]}, split=datasets.NamedSplit("test")
    )
    chosen = with_numbered_labels(whole.select([3, 0, 1]), "label")
    assert chosen.features["label"].names == ["2", "9", "10"] and chosen["label"][:] == [0, 2, 1]
    assert chosen.split == whole.split
    for fractions, labels in (([1.0, None, float("nan")], [1, None, None]), ([0.5, 1.0], [0.5, 1.0])):  # empty cells
        rows = datasets.Dataset.from_dict({"image": ["a.png"] * len(labels), "label": fractions})
        assert with_numbered_labels(rows, "label")["label"][:] == labels
