"""One set of properties over all doors of tests/doors.py: the same pixels, the same files of a folder, the same names and
prompts, and bad ones refused alike, before long work."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import read_json
from doors import OF_FILES, OF_FOLDERS, Failed, World, column, command
from pictures import BROKEN, NO_IMAGES, PIXELS, put_photos
from PIL import Image

import hf_vs2
from hf_vs2 import extract_activations, load_images
from hf_vs2.atlas.material import truth_of
from hf_vs2.atlas.writing import thumbnail, write_thumbnails
from hf_vs2.data import UnreadableImageError
from hf_vs2.data.labels.lists import names_in
from hf_vs2.data.registry import dataset_info
from hf_vs2.evaluation.comparison import evaluate


@pytest.fixture(scope="module", autouse=True)
def machine():
    """Without pillow-heif; threads are cut before they are resized; adapt's SAE is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vs2.data.folders.listing.heif_is_readable", lambda: False)
        patch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS)
        patch.setattr("hf_vs2.training.arguments.SAETrainingArguments.num_steps", lambda *_: 3)
        yield


@pytest.fixture(scope="module")
def world(checkpoint, clip_path, tmp_path_factory) -> World:
    return World(checkpoint, clip_path, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def photos(world):
    """A folder as people have it: its root, and {file: what is to be seen; `None`: broken}."""
    root = world.out / "photos"
    return root, put_photos(root)


@pytest.fixture(scope="module")
def whole(photos) -> list[Path]:
    root, files = photos
    return [root / name for name, shown in files.items() if shown is not None]


@pytest.fixture(scope="module")
def expected(world, photos):
    found = world.expected([shown for shown in photos[1].values() if shown is not None])
    assert len({round(fvu, 5) for fvu in found["fvu"].tolist()}) == len(found["fvu"]), "the files must be told apart"
    return found


def assert_same(found, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found).float(), expected, rtol=1e-3, atol=1e-4)


# Images


@pytest.mark.parametrize("door", OF_FILES)
@torch.no_grad()
def test_a_file_is_the_same_picture_at_every_door(door, world, whole, expected):
    """Training saw upright images on white while `classify` saw them lying on black: its answers were of other images."""
    answer, gives, step = OF_FILES[door]
    assert_same(answer(world, whole[step - 1 :: step]), expected[gives][step - 1 :: step])


def test_pages_show_the_same_pictures(world, photos, whole, tmp_path):
    write_thumbnails(tmp_path, column(whole), "image", range(len(whole)), progress=False)
    shown = [pixels for pixels in photos[1].values() if pixels is not None]
    for pixels, small in zip(shown, sorted(tmp_path.rglob("*.jpg"), key=lambda path: int(path.stem)), strict=True):
        assert small.read_bytes() == thumbnail(Image.fromarray(pixels))


READ_BY_CALLER = ("pipeline, PIL", "pipeline, opened before", "pipeline, arrays", "pipeline, tensors")
NAMELESS = ("pipeline, bytes", "pipeline, memory", "the Space")


@pytest.mark.parametrize(
    "door", [door for door in OF_FILES if door not in (*READ_BY_CALLER, "encode_images, PIL", "pipeline, base64")]
)
def test_a_broken_image_is_named_with_the_reason(door, world, photos, whole):
    """Whichever function meets it, the user learns which file to look at, and why."""
    for name in ("cut.jpg", "gone.png") if door.startswith("classify") else BROKEN:
        file, reason = photos[0] / "dog" / name, BROKEN[name]
        if door in NAMELESS and not file.exists():
            continue
        reason = "404" if "web" in door and not file.exists() else reason
        with pytest.raises((UnreadableImageError, Failed), match=reason) as caught:
            OF_FILES[door].answer(world, [whole[0], file])
        assert name in str(caught.value) or door in NAMELESS and re.search("^(image 1|the image) ", str(caught.value))


@pytest.mark.parametrize("door", OF_FOLDERS)
def test_a_folder_is_read_alike_and_a_broken_image_stops_or_is_left_out(door, world, photos, expected, caplog):
    """What one command counts and another leaves out makes their figures incomparable; a pipe makes one hang. Strict by
    default, or a typo in a path silently halves a data set; `--on_error skip`, or one bad file in a million costs the
    night: they are counted and listed, with reasons."""
    root, _ = photos
    with pytest.raises((UnreadableImageError, Failed)) as caught:
        OF_FOLDERS[door].answer(world, root, "raise")
    message = str(caught.value)
    assert str(root / "dog" / "bomb.png") in message and BROKEN["bomb.png"] in message
    assert ("on_error='skip'" if "_" in door else "--on_error skip") in message
    caplog.clear()
    caplog.set_level("INFO", "transformers")
    assert_same(OF_FOLDERS[door].answer(world, root, "skip"), expected["fvu"])
    for name, reason in BROKEN.items():
        lines = [line for line in caplog.messages if line.startswith("Skipped:") and name in line]
        assert len(lines) <= 1 and all(str(root / "dog" / name) in line and reason in line for line in lines)
    counted = f"{len(BROKEN)} of {len(photos[1])} images could not be read and were skipped."
    assert counted in caplog.messages or door == "classify", "whose last line counts them"


def test_what_was_left_out_is_on_record_and_rows_are_found_again(world, photos):
    """After the commands above: in the rows, the SAE, the figures; and of the same images, with the same labels, the rows
    of one command are those of the next."""
    found = {path.parents[1].name.split()[0]: path for path in world.out.glob("* cache skip/*/index.json")}
    index, good = read_json(found["extract"]), len(photos[1]) - len(BROKEN)
    assert (index["num_images"], index["num_rows"]) == (len(photos[1]), good)
    listed = {Path(one["path"]).name: one["error"] for one in index["skipped"]}
    assert list(listed) == sorted(BROKEN)
    assert all(BROKEN[name] in error and "0x" not in error for name, error in listed.items()), (
        "no address: bytes differ"
    )
    assert read_json(world.out / "train" / "config.json")["training_data"]["skipped"] == len(BROKEN)
    meta = read_json(world.out / "evaluate")["meta"]
    assert meta["dataset"]["skipped"] == len(BROKEN) and meta["n"] == good
    names = {command: path.parent.name for command, path in found.items()}
    assert (
        names["extract"]
        == names["train"]
        == names["calibrate"]
        == names["recommend"]
        != names["evaluate"]
        == names["atlas"]
    )
    assert not any(read_json(path)["complete"] for path in world.out.glob("* cache raise/*/index.json"))


def test_a_folder_holds_the_same_files_and_says_which_it_leaves_out(photos, caplog):
    root, files = photos
    caplog.set_level("INFO", "transformers")
    paths = [str(root / name) for name in files]
    for rows in (
        load_images(root),
        load_images(root, streaming=True),
        dataset_info({"name": "mine", "path": str(root)}).load("train"),
    ):
        assert [row["image"]["path"] for row in rows] == paths
        assert [rows.features["label"].int2str(row["label"]) for row in rows] == [name[:3] for name in files]
    said = caplog.messages[0]
    assert said.startswith(f"{root}: not read are 2 .heic files (pip install pillow-heif), ")
    for part in ("2 links to a folder around it", "1 special file", f"{len(NO_IMAGES)} hidden files", "1 .txt file"):
        assert part in said
    assert "1 file without suffix" in said


# Names and prompts


@pytest.fixture(scope="module")
def asked(world, images_path, tmp_path_factory):
    """{door: f(labels, **options)}: what labels and prompts come to."""
    model, image = world.model, str(images_path / "test/red/00.png")
    processor, data = (world.tokenizer, world.processor), ["--dataset", images_path, "--split", "test"]
    out = tmp_path_factory.mktemp("asked")
    rows = extract_activations(
        model.clip, load_images(images_path, "test"), out / "rows", label_column="label", progress=False,
        image_processor=world.processor,
    )  # fmt: skip

    def pipeline(labels, **options):
        found = {one["label"]: one["score"] for one in world.classifier(image, labels, **options)}
        return [found[label] for label in names_in(labels)]

    def fitted(labels, **options):
        with model.steering(method="distribution_norm"):
            return model.fit_label_set(labels, processor=processor, **options).class_embeds.flatten().tolist()

    def by_command(name, *words):
        def run(labels, templates="single", clean=True):
            flags = ["--labels", *labels, "--templates", templates, *([] if clean else ["--names_as_given"])]
            return command(name, *words, *flags, "--disable_tqdm" if name not in ("explain",) else "--json")

        return run

    def classify(labels, **options):
        (found,) = json.loads(
            by_command("classify", image, "--checkpoint", world.checkpoint, *top, "--json")(labels, **options)
        )
        scores = {one["label"]: one["score"] for one in found["predictions"]}
        return [scores[label] for label in labels]

    top = ["--top_k", 3]
    used = ["--checkpoint", world.checkpoint, *data, "--activations_dir", out / "no rows"]
    explain = lambda labels, **options: model.explain(image, labels, processor=processor, **options)  # noqa: E731
    return rows, {
        "pipeline": pipeline,
        "explain": lambda labels, **options: explain(labels, **options).steered_scores[0].softmax(-1).tolist(),
        "fit_label_set": fitted,
        "class_embeddings": lambda labels, **options: hf_vs2.class_embeddings(
            model.clip, world.tokenizer, labels, **options
        ).flatten().tolist(),
        "classify": classify,
        "evaluate, the function": lambda labels, templates="single": evaluate(
            model, rows.tensor(), rows.labels, labels, world.tokenizer, templates=[templates], methods=["vs2"]
        ),
        "adapt, the function": lambda labels, **options: hf_vs2.adapt(
            str(world.clip), images_path / "test", labels, out / "adapted", progress=False, **options
        ),
        "explain, the command": by_command("explain", image, "--checkpoint", world.checkpoint),
        "evaluate": by_command("evaluate", *used, "--output", out / "r.json"),
        "recommend": by_command("recommend", *used),
        "atlas": by_command("atlas", *used, "--output", out / "atlas"),
        "adapt": by_command("adapt", "--model", world.clip, *data, "--output_dir", out / "adapted"),
    }  # fmt: skip


def test_a_list_of_names_means_the_same_at_every_door(world, asked, images_path, tmp_path):
    """`classify` must give the scores that `evaluate` measured, whatever the door and however names are spelled."""
    rows, doors = asked
    names = {"blue": "001.Navy_blue", "green": "lime", "red": "scarlet_red"}
    plain, given = ["Navy blue", "lime", "scarlet red"], list(names.values())
    (tmp_path / "labels.json").write_text(json.dumps(names))
    for door in ("pipeline", "explain", "fit_label_set", "class_embeddings", "classify"):
        found = doors[door](plain, templates="single")
        assert doors[door](given, templates="single") == pytest.approx(found, abs=1e-5), door
        if door != "classify":  # which reads them from a file
            assert doors[door](names, templates={"a photo": "a photo of a {}."}) == pytest.approx(found, abs=1e-5), (
                door
            )
        assert doors[door](given, templates="single", clean=False) != pytest.approx(found, abs=1e-5), door
        with pytest.raises((ValueError, Failed), match="are one to this CLIP|'lime' twice"):
            doors[door](["Lime", "lime"])
    info = dataset_info({"name": "colours", "path": str(images_path), "classes": names})
    assert info.class_names(info.load("test")) == truth_of(rows, None, names, clean=True).class_names == plain
    measured = evaluate(world.model, rows, None, names, world.tokenizer, templates="single", methods=["vs2"])
    assert measured.per_class["class_names"] == plain
    flags = ["--checkpoint", world.checkpoint, "--labels", tmp_path / "labels.json", "--json"]
    found = json.loads(command("classify", images_path / "test", *flags))
    answers = [given.index(one["predictions"][0]["label"]) for one in found]
    assert answers == measured.samples[measured.index("vs2", "single")].predictions.tolist()


COLOURS = ["blue", "green", "red"]
BAD_NAMES = {
    "twice": ([*COLOURS, "blue"], "'blue' twice"),
    "twice but for what is cleaned": ([*COLOURS, "night_bird", "night bird"], "'night bird' twice"),
    "one to this CLIP": ([*COLOURS, "Red"], "the names 'red' and 'Red' are one to this CLIP"),
    "blank": ([*COLOURS, " "], r"\[3\] is empty"),
    "of other bytes": ([*COLOURS, "caf\udce9"], "which is not UTF-8 text"),
    "none": ([], "is empty|expected at least one argument"),
    "a number": ([*COLOURS, 3], r"\[3\] is 3, a int"),
    "one text": ("cat, dog", "must be a list of strings, not 'cat, dog'.*split"),
}
OF_PYTHON = (
    "pipeline",
    "explain",
    "fit_label_set",
    "class_embeddings",
    "evaluate, the function",
    "adapt, the function",
)
CALLED = {"pipeline": "candidate_labels", "class_embeddings": "class_names", "evaluate, the function": "class_names"}
DOORS_OF_NAMES = (*OF_PYTHON, "classify", "explain, the command", "evaluate", "recommend", "atlas", "adapt")


@pytest.mark.parametrize("door", DOORS_OF_NAMES)
def test_bad_names_are_refused_before_the_first_image(door, asked, no_image):
    """Two classes with the same prompts can never be told apart: accuracy would silently lose one of them."""
    for kind, (names, message) in BAD_NAMES.items():
        if door not in OF_PYTHON and kind in ("a number", "one text"):  # not to be said on a command line
            continue
        if door in ("pipeline", "classify") and kind == "one to this CLIP":  # which read a batch of images first
            continue
        with pytest.raises((ValueError, TypeError, Failed), match=message) as caught:
            asked[1][door](names)
        called = CALLED.get(door, "labels") in str(caught.value)
        assert called or kind == "one to this CLIP", "as whoever gave them calls them"


BAD_TEMPLATES = {
    "unknown": ("ensembel", "neither one of .*'ensemble'.* nor a file of prompts"),
    "one text": ("a photo of a {}.", "put it in a list"),
    "none": ([], "is empty"),
    "no place for the name": (["a photo of a dog."], "has no {}"),
    "a number": ([3], "must be a string"),
    "an empty file": ("empty.txt", "empty.txt is empty"),
    "no file": ("nope.json", "nope.json.*nor a file of prompts"),
    "no UTF-8": ("other.txt", "other.txt is not UTF-8"),
    "a line without the name": ("lines.csv", "lines.csv holds 'the cat', which has no {}"),
}


@pytest.mark.parametrize("door", DOORS_OF_NAMES)
def test_bad_templates_are_refused_before_the_first_image(door, asked, no_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("other.txt").write_bytes(b"\xff\xfe\x00{}")
    Path("lines.csv").write_text('template\n"a {}, small"\nthe cat\n')
    for kind, (templates, message) in BAD_TEMPLATES.items():
        if door not in OF_PYTHON and not isinstance(templates, str):
            continue
        if (door, kind) == ("evaluate, the function", "one text"):  # which takes several sets, one of them in a list
            continue
        with pytest.raises((ValueError, TypeError, Failed), match=message):
            asked[1][door](COLOURS, templates=templates)


# Checkpoints


BAD_CHECKPOINTS = {
    "nowhere": (lambda folder, good, clip: folder.rmdir(), "nowhere"),
    "a plain CLIP": (lambda folder, good, clip: copied(clip, folder), "is a plain CLIP without SAE|a plain CLIP"),
    "no configuration": (
        lambda folder, good, clip: (folder / "config.json").write_text("{}"),
        "has no config.json, or an empty one",
    ),
    "cut off": (lambda folder, good, clip: cut(copied(good, folder)), "model.safetensors is damaged"),
}


def copied(source: Path, folder: Path) -> Path:
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])


@pytest.mark.parametrize("bad", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_every_command(bad, world, clip_path, images_path, tmp_path, no_image):
    """In one line that names it, before the first image."""
    folder, (harm, message) = tmp_path / "nowhere", BAD_CHECKPOINTS[bad]
    folder.mkdir()
    harm(folder, world.checkpoint, clip_path)
    data, image = ["--dataset", images_path, "--split", "test"], images_path / "test/red/00.png"
    out = tmp_path / "out"
    for name, words in {
        "evaluate": [*data, "--output", out / "r.json", "--activations_dir", out],
        "recommend": [*data, "--labels", *COLOURS, "--activations_dir", out],
        "calibrate": [*data, "--output_dir", out, "--activations_dir", out],
        "atlas": [*data, "--output", out / "atlas", "--activations_dir", out],
        "explain": [image, "--labels", *COLOURS, "--json"],
        **({} if bad == "a plain CLIP" else {"classify": [image, "--labels", *COLOURS]}),
    }.items():
        with pytest.raises(Failed, match=message) as caught:
            command(name, "--checkpoint", folder, *words)
        assert "nowhere" in str(caught.value), name
    assert not out.exists()
