"""One loader for every CLIP: what can't be used is refused in the same words wherever a CLIP comes in."""

import io
import json
import re
import shutil

import harms
import pytest
import safetensors.torch
import torch
from commands import complaint, image_commands
from hub_models import CLIP_FILES, make_sae, upload_clip
from safetensors.torch import load_file
from transformers import BlipConfig, BlipModel, CLIPModel
from transformers.integrations import hub_kernels

import hf_vs2
from hf_vs2 import ActivationStore, SAEConfig, SAEModel, SAETrainer, SAETrainingArguments, VS2CLIPForZeroShot
from hf_vs2.data import load_images
from hf_vs2.encoders.loading import load_clip
from hf_vs2.encoders.processing import load_processing
from hf_vs2.encoders.vision_tower import VisionTower
from hf_vs2.retrieval import embed_images
from hf_vs2.study import StudyConfig
from hf_vs2.study.bench import Bench


LOST = "vision_model.encoder.layers.1.mlp.fc1.weight"


# Every door, every bad CLIP


def evil_pickle(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "x": harms.Code(folder / "was-here")}, folder / "pytorch_model.bin")


def adapter(folder):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "ada/clip"})
    )


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


CODE = "asks for other files or code"
BAD = {
    "lacks a weight": (harms.without(LOST), f"is damaged: it has no {LOST}"),
    "lacks its temperature": (harms.without("logit_scale"), "it has no logit_scale"),
    "NaN": (harms.tensor(LOST, harms.at(-1, float("nan"))), f"{LOST} holds NaN"),
    "NaN in the text tower": (
        harms.tensor("text_projection.weight", harms.at(-1, float("nan"))),
        "text_projection.weight holds NaN",
    ),
    "infinity": (harms.tensor(LOST, harms.at(-1, float("inf"))), f"{LOST} holds .* inf"),
    "temperature": (harms.tensor("logit_scale", lambda one: one.fill_(1000)), "logit_scale is 1000"),
    "cut off": (cut, "model.safetensors is damaged"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no model.safetensors and no pytorch_model.bin",
    ),
    "a pickle with code": (evil_pickle, "pytorch_model.bin is a pickle with more in it than tensors"),
    "a kernel": (harms.config(attn_implementation="kernels-community/flash-attn3"), CODE),
    "a kernel for a part": (harms.config("vision_config", _attn_implementation="evil/kernel"), CODE),
    "a kernel in disguise": (harms.config(_attn_implementation_internal="evil/kernel"), CODE),
    "a kernel by its short name": (harms.config(attn_implementation={"text_config": "flash_attention_2"}), CODE),
    "another file": (harms.config(transformers_weights="other.safetensors"), CODE),
    "a million layers": (
        harms.config("vision_config", num_hidden_layers=10**6),
        "num_hidden_layers.* nothing in a CLIP",
    ),
    "a billion labels": (harms.config(num_labels=10**9), "num_labels.* nothing in a CLIP"),
    "too many layers": (harms.config("vision_config", num_hidden_layers=400), "says num_hidden_layers=400"),
    "too few layers": (harms.config("text_config", num_hidden_layers=1), "says num_hidden_layers=1"),
    "another width": (harms.config("vision_config", hidden_size=192), r"vision_model.* by config.json it is \(192"),
    "another family": (harms.config(model_type="blip"), "holds a model of type 'blip'; expected a"),
    "no type": (harms.config(model_type=None), "holds a model of type None; expected a"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.* is not a valid JSON"),
    "JSON of another kind": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "config.json of .* JSON object",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json, or an empty one"),
    "an adapter": (adapter, "holds an adapter .*merge_and_unload"),
    "nothing": (shutil.rmtree, "There is no folder"),
}


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory):
    """An SAE checkpoint of the demo's CLIP, whose place `named` changes."""
    folder = tmp_path_factory.mktemp("sae")
    make_sae(CLIPModel.from_pretrained(CLIP_FILES)).save_pretrained(folder)
    return folder


@pytest.fixture()
def bad_clip(tmp_path):
    def make(harm):
        folder = tmp_path / "bad-clip"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CLIP_FILES, folder)
        harm(folder)
        return folder

    return make


def named(sae_folder, clip):
    """The SAE checkpoint with another CLIP's name in it."""
    folder = clip.with_name("sae-of-bad-clip")
    shutil.copytree(sae_folder, folder)
    harms.config(base_model_name_or_path=str(clip))(folder)
    return folder


def study(clip, images):
    content = {
        "output_dir": str(clip.with_name("study")),
        "encoders": [{"id": "x/y", "path": str(clip)}],
        "datasets": [{"name": "colours", "path": str(images)}],
    }
    return Bench(StudyConfig.from_dict(content)).encoder("y")


PYTHON_DOORS = {
    "load_clip": lambda clip, sae, images: load_clip(clip),
    "the CLIP that an SAE names": lambda clip, sae, images: VS2CLIPForZeroShot.from_pretrained(named(sae, clip)),
    "clip=": lambda clip, sae, images: VS2CLIPForZeroShot.from_pretrained(sae, clip=clip),
    "zero_shot_classifier": lambda clip, sae, images: hf_vs2.zero_shot_classifier(clip),
    "extract_activations": lambda clip, sae, images: hf_vs2.extract_activations(
        str(clip), load_images(images, "test"), clip.with_name("rows"), progress=False
    ),
    "VisionTower": lambda clip, sae, images: VisionTower.of(clip),
    "study": lambda clip, sae, images: study(clip, images),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_clip_is_refused_in_the_same_words_by_every_python_door(bad, bad_clip, sae_folder, images_path):
    """Where one door was left open, a CLIP without a weight got random ones and trained an SAE with exit 0, NaN became
    an answer, and a kernel was fetched and run."""
    harm, message = BAD[bad]
    clip, heard = bad_clip(harm), set()
    for door, load in PYTHON_DOORS.items():
        with pytest.raises((ValueError, OSError), match=message) as caught:
            load(clip, sae_folder, images_path)
        text = str(caught.value)
        assert "bad-clip" in text, f"{door} does not name the CLIP: {text}"
        heard.add(re.search(message, text)[0])
    assert len(heard) == 1
    assert not (clip / "was-here").exists()


@pytest.mark.parametrize("bad", ["lacks a weight", "NaN", "a kernel"])
def test_a_bad_clip_is_refused_by_every_command(bad, bad_clip, sae_folder, images_path, capsys):
    harm, message = BAD[bad]
    clip = bad_clip(harm)
    picture, data = next((images_path / "test").rglob("*.png")), ["--dataset", images_path, "--split", "test"]
    doors = image_commands(clip, sae_folder, data, clip.with_name("out"), picture)
    for name, arguments in doors.items():
        arguments += ["--clip", clip] if "--checkpoint" in arguments else []
        heard = complaint(capsys, *arguments)
        assert re.search(message, heard) and "bad-clip" in heard, f"{name}: {heard}"
    heard = complaint(capsys, "classify", picture, "--checkpoint", clip, "--labels", "red", "green")
    assert re.search(message, heard) and "bad-clip" in heard, heard
    assert not clip.with_name("out").exists() or not list(clip.with_name("out").rglob("*.safetensors"))


def test_no_kernel_is_fetched(bad_clip, sae_folder, images_path, monkeypatch):
    """With the package `kernels` installed, `flash_attention_2` in a stranger's config.json was enough to run code
    from the Hub."""
    fetched = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *arguments, **_: fetched.append(arguments))
    clip = bad_clip(harms.config(attn_implementation="flash_attention_2"))
    with pytest.raises((ImportError, ValueError)):
        CLIPModel.from_pretrained(clip)
    assert fetched, "transformers does not fetch it any more: the test proves nothing"
    fetched.clear()
    for load in (*PYTHON_DOORS.values(), lambda clip, sae, images: embed_images(clip, load_images(images, "test"))):
        with pytest.raises(ValueError, match=CODE):
            load(clip, sae_folder, images_path)
    assert not fetched


def test_other_vision_models_are_loaded_with_the_same_care(bad_clip, images_path):
    """The neighbours of VS2++ may come from any encoder: one with random weights finds random neighbours."""
    images = load_images(images_path, "test").select(range(2))
    for bad in ("lacks a weight", "NaN", "no weights", "too many layers"):
        harm, message = BAD[bad]
        with pytest.raises((ValueError, OSError), match=message):
            embed_images(bad_clip(harm), images)
    assert embed_images(bad_clip(lambda folder: None), images).shape == (2, 64)


def test_a_clip_given_as_an_object_is_looked_at(sae_folder, images_path, tmp_path):
    """It was checked when it was loaded, perhaps, but has been trained since, or comes from transformers itself."""
    sae = SAEModel.from_pretrained(sae_folder)
    doors = {
        "VS2": lambda clip: VS2CLIPForZeroShot(clip, sae),
        "clip=": lambda clip: VS2CLIPForZeroShot.from_pretrained(sae_folder, clip=clip),
        "pipeline": hf_vs2.zero_shot_classifier,
        "rows": lambda clip: hf_vs2.extract_activations(
            clip, load_images(images_path, "test"), tmp_path, progress=False
        ),
    }
    for door, enter in doors.items():
        clip = CLIPModel.from_pretrained(CLIP_FILES, dtype=torch.float32)
        enter(clip)
        with torch.no_grad():
            clip.vision_model.encoder.layers[1].mlp.fc2.weight[5, 7] = torch.nan
        with pytest.raises(ValueError, match="mlp.fc2.weight holds NaN"):
            enter(clip)
            pytest.fail(door)
        clip = CLIPModel.from_pretrained(CLIP_FILES, dtype=torch.float32)
        with torch.no_grad():
            clip.logit_scale.fill_(-1000)
        with pytest.raises(ValueError, match="logit_scale is -1000"):
            enter(clip)
            pytest.fail(door)
    offloaded = CLIPModel.from_pretrained(CLIP_FILES, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    with pytest.raises(ValueError, match="weights left on the disk"):
        doors["rows"](offloaded)


# Families


def tiny(model_class, config_class, **text):
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "text_config": {**tower, "vocab_size": 99, **text},
        "vision_config": {**tower, "image_size": 32, "patch_size": 8},
    }
    return model_class(config_class(**parts))


def test_a_family_that_nothing_can_steer_is_refused_before_the_first_image(tmp_path, images_path):
    """Its rows would be extracted, and an SAE trained on them for an hour, which then no model would take."""
    model, images = tiny(BlipModel, BlipConfig), load_images(images_path, "test")
    model.save_pretrained(tmp_path / "encoder")
    kind = model.config.model_type
    for given in (model, str(tmp_path / "encoder")):
        with pytest.raises(ValueError, match=f"a model of type '{kind}'; expected a CLIP .*can be steered"):
            hf_vs2.extract_activations(given, images, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_rows_of_such_a_family_are_not_trained_on(checkpoint, tmp_path):
    """An earlier version has extracted them."""
    shutil.copytree(next((checkpoint / "activations").glob("*/index.json")).parent, tmp_path / "rows")
    tiny(BlipModel, BlipConfig).save_pretrained(tmp_path / "encoder")
    store = ActivationStore.open(tmp_path / "rows")
    store.metadata["model"]["id"] = str(tmp_path / "encoder")
    with pytest.raises(ValueError, match="holds a model of type 'blip'"):
        SAETrainer(SAEConfig(hidden_size=32, top_k=4), SAETrainingArguments(output_dir=str(tmp_path / "out")), store)


# Files of weights


def as_pickle(folder, parts=1):
    """Weights as OpenAI's first repositories have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{number % parts + 1:05}-of-{parts:05}.bin" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_pickle_of_tensors_alone_is_read_and_said(bad_clip, caplog, parts):
    """Some of OpenAI's own repositories hold nothing else. Whoever trusts no pickle must read that it was one."""
    clip = load_clip(bad_clip(lambda folder: as_pickle(folder, parts)))
    assert caplog.text.count("its weights are read from pytorch_model.bin") == 1
    ours = CLIPModel.from_pretrained(CLIP_FILES)
    assert all(torch.equal(*pair) for pair in zip(clip.state_dict().values(), ours.state_dict().values(), strict=True))
    with pytest.raises(OSError, match="has no model.safetensors"):
        load_clip(clip.config._name_or_path, use_safetensors=True)


def test_safetensors_are_taken_where_there_are_any(bad_clip, caplog):
    """Whole or in parts, also beside a pickle, which then is not opened, whatever is in it."""
    folder = bad_clip(lambda folder: None)
    tensors = load_file(folder / "model.safetensors")
    torch.save({"x": harms.Code(folder / "was-here")}, folder / "pytorch_model.bin")
    load_clip(folder)
    (folder / "model.safetensors").unlink()
    CLIPModel.from_pretrained(CLIP_FILES).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_clip(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in tensors.items())
    assert "pytorch_model" not in caplog.text and not (folder / "was-here").exists()


def upload_pickle(hub, name):
    """A CLIP on the Hub of which there is a pickle alone; returns what its safetensors were."""
    upload_clip(name)
    repository = hub[name]
    files = dict(repository.head.files)
    safe = files.pop("model.safetensors")
    files["pytorch_model.bin"] = type(safe)(pickled(safe.content), True)
    repository.branches["main"] = repository.add(files, "pickles", repository.head.sha)
    return safe


def pickled(content):
    buffer = io.BytesIO()
    torch.save(safetensors.torch.load(content), buffer)
    return buffer.getvalue()


def propose(hub, name, safe, author, number, title="Adding `safetensors` variant of this model"):
    repository = hub[name]
    reference = f"refs/pr/{number}"
    commit = repository.add({**repository.head.files, "model.safetensors": safe}, title, repository.head.sha)
    repository.pull_requests[reference], repository.titles[reference] = commit, title
    repository.authors[reference] = author


def test_the_hubs_own_conversion_is_taken_and_found_again_offline(hub, tmp_path, caplog):
    """As transformers finds it: the bot's open pull request on the newest commit. Nobody else's: it may hold any
    weights."""
    name, cache = "ada/pickled", tmp_path / "cache"
    safe = upload_pickle(hub, name)
    main = hub[name].head.sha
    evil = type(safe)(safe.content[:-4] + b"\0\0\xc8\x42", True)  # another number in the last place
    propose(hub, name, evil, "mallory", 7)
    load_clip(name, {"cache_dir": cache})
    assert "read from pytorch_model.bin" in caplog.text
    propose(hub, name, safe, "SFconvertbot", 8)
    caplog.clear()
    with hub.recording() as requests:
        clip = load_clip(name, {"cache_dir": cache})
    assert "pytorch_model.bin" not in caplog.text
    assert clip.config._commit_hash == main, "what is recorded must be a commit of the repository itself"
    expected = CLIPModel.from_pretrained(CLIP_FILES, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in clip.state_dict().items())
    assert {method for method, *_ in requests} <= {"GET", "HEAD"}, "nothing is sent to a service that converts"
    with hub.recording() as requests:
        load_clip(name, {"cache_dir": cache, "local_files_only": True})
        load_clip(name, {"cache_dir": cache, "revision": main})
    assert not requests and "pytorch_model.bin" not in caplog.text
    hub[name].edit("README.md", "newer")
    load_clip(name, {"cache_dir": cache})
    assert "read from pytorch_model.bin" in caplog.text, "a conversion of an older commit"


# dtype


@pytest.mark.parametrize(("name", "dtype"), [("dtype", "bfloat16"), ("torch_dtype", torch.bfloat16)])
def test_the_older_name_of_dtype_is_the_same(name, dtype, sae_folder, tmp_path):
    """transformers takes both. Here one half of a model followed it and the other did not, or neither did."""
    model = VS2CLIPForZeroShot.from_pretrained(sae_folder)
    model.save_pretrained(tmp_path / "light")
    model.save_pretrained(tmp_path / "full", full=True)
    for folder in (sae_folder, tmp_path / "light", tmp_path / "full"):
        for load in (VS2CLIPForZeroShot.from_pretrained, lambda *a, **k: hf_vs2.zero_shot_classifier(*a, **k).model):
            loaded = load(folder, **{name: dtype})
            assert loaded.clip.dtype == loaded.sae.dtype == torch.bfloat16, (folder.name, load)
            assert loaded.sae.mean.dtype == torch.float32, "which the gate hangs on"
    assert hf_vs2.zero_shot_classifier(CLIP_FILES, **{name: dtype}).model.dtype == torch.bfloat16
    assert load_clip(CLIP_FILES, **{name: dtype}).dtype == torch.bfloat16
    assert SAEModel.from_pretrained(sae_folder, **{name: dtype}).dtype == torch.bfloat16
    SAEModel.from_pretrained(sae_folder).save_sparsify(tmp_path / "layers.2")
    assert SAEModel.from_sparsify(tmp_path / "layers.2", **{name: dtype}).dtype == torch.bfloat16


def test_two_dtypes_that_differ_are_refused(sae_folder):
    load = VS2CLIPForZeroShot.from_pretrained
    with pytest.raises(ValueError, match="dtype='float16' and torch_dtype=torch.bfloat16 mean the same"):
        load(sae_folder, dtype="float16", torch_dtype=torch.bfloat16)
    assert load(sae_folder, dtype="float16", torch_dtype=torch.float16).clip.dtype == torch.float16
    auto = load(sae_folder, torch_dtype="auto")
    assert (auto.clip.dtype, auto.sae.dtype) == (torch.float16, torch.float32)  # as each is stored


# What is not there


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such/folder", "no-such-folder", "../no/such/folder"])
@pytest.mark.parametrize(
    "load",
    [
        *(SAEModel.from_pretrained, VS2CLIPForZeroShot.from_pretrained, hf_vs2.RetrievalCorpus.from_pretrained),
        *(SAEModel.from_sparsify, SAEModel.from_prisma, hf_vs2.zero_shot_classifier, load_clip, load_processing),
        *(VisionTower.of, lambda name, **place: embed_images(name, [])),
    ],
)
def test_what_is_not_there_is_named(load, name):
    """ "Repo id must be in the form ..." and "We couldn't connect ..." do not say which of the three things named was
    meant."""
    with pytest.raises(OSError, match=re.escape(name)):
        load(name)
    if load not in (VisionTower.of,) and "lambda" not in repr(load):
        with pytest.raises(OSError, match=re.escape(name)):
            load(name, local_files_only=True) if load is not load_clip else load(name, {"local_files_only": True})


def test_a_clip_that_has_moved_is_asked_for(sae_folder, tmp_path, capsys, images_path):
    """A checkpoint of another machine names its CLIP by that machine's path."""
    moved = named(sae_folder, tmp_path / "models" / "clip")
    picture = next((images_path / "test").rglob("*.png"))
    with pytest.raises(OSError, match="sae-of-bad-clip names .*models/clip as its CLIP.* There is no folder .*clip="):
        VS2CLIPForZeroShot.from_pretrained(moved)
    assert "--clip" in complaint(capsys, "classify", picture, "--checkpoint", moved, "--labels", "a", "b")
    VS2CLIPForZeroShot.from_pretrained(moved, clip=CLIP_FILES)


# Tokenizer and image processor


def setting(**fields):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGE = {
    "tokenizer cut off": ("tokenizer.json", lambda path: path.write_bytes(path.read_bytes()[:500])),
    "tokenizer empty": ("tokenizer.json", lambda path: path.write_text("")),
    "tokenizer of other JSON": ("tokenizer.json", lambda path: path.write_text('{"a": 1}')),
    "tokenizer without words": ("tokenizer.json", setting(model={"type": "BPE", "vocab": {}, "merges": []})),
    "tokenizer settings": ("tokenizer_config.json", lambda path: path.write_text("[1")),
    "tokenizer settings of another kind": ("tokenizer_config.json", lambda path: path.write_text("[]")),
    "processor cut off": ("preprocessor_config.json", lambda path: path.write_bytes(path.read_bytes()[:40])),
    "no UTF-8": ("preprocessor_config.json", lambda path: path.write_bytes(b"\xff\xfe{")),
    "deviation 0": ("preprocessor_config.json", setting(image_std=[0, 0, 0])),
    "mean NaN": ("preprocessor_config.json", setting(image_mean=[float("nan")] * 3)),
    "two means": ("preprocessor_config.json", setting(image_mean=[0.5, 0.5])),
    "huge": ("preprocessor_config.json", setting(size={"shortest_edge": 60000})),
    "huge crop": ("preprocessor_config.json", setting(crop_size={"height": 10**9, "width": 28})),
    "factor": ("preprocessor_config.json", setting(rescale_factor=1e30)),
    "filter": ("preprocessor_config.json", setting(resample=99)),
}


@pytest.fixture(scope="module")
def vs2_folder(sae_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vs2") / "vs2"
    VS2CLIPForZeroShot.from_pretrained(sae_folder, clip=CLIP_FILES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_tokenizer_or_processor_is_refused_by_the_name_of_its_file(harm, bad_clip, vs2_folder, tmp_path):
    """ "Expecting value: line 1 column 1", "red nan", or no end: and in a checkpoint of ours the CLIP's own came in
    their place, which need not be those that it was made with."""
    file, damage = DAMAGE[harm]
    clip = bad_clip(lambda folder: None)
    shutil.copytree(vs2_folder, tmp_path / "vs2")
    for folder in (clip, tmp_path / "vs2"):
        damage(folder / file)
        for load in (hf_vs2.zero_shot_classifier, load_processing):
            with pytest.raises(ValueError, match=re.escape(file)) as caught:
                load(folder)
            assert folder.name in str(caught.value)
    if file == "preprocessor_config.json":
        with pytest.raises(ValueError, match=file):
            VisionTower.of(clip).image_processor()
