"""The Space: what it says of an image is what the library says, for everybody at once, and the page shows it."""

import io
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browsing import axe, chromium, needs_axe, needs_browser
from transformers import CLIPModel

import hf_vs2
from hf_vs2 import SAEConfig, SAETrainer, SAETrainingArguments, VS2CLIPForZeroShot, extract_activations
from hf_vs2.encoders.processing import load_processing


pytest.importorskip("sklearn")

SPACE = Path(__file__).parents[1] / "examples" / "space"
DEMO_CLIP = Path(hf_vs2.__file__).parent / "demo_assets"
LABELS = ("zero", "one", "two", "<b>bold</b>")


def file_of(image):
    """The bytes of an image's file: what people upload."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def digits():
    from hf_vs2.demo.data import load_handwriting

    return load_handwriting().select(range(240))


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    """A VS2 checkpoint of the demo's CLIP with a gate that holds some of the digits back."""
    folder = tmp_path_factory.mktemp("space")
    clip = CLIPModel.from_pretrained(DEMO_CLIP, dtype=torch.float32).eval()
    store = extract_activations(
        clip, digits, folder / "rows", image_processor=load_processing(DEMO_CLIP)[1], dataset_id="digits"
    )
    arguments = SAETrainingArguments(
        str(folder / "sae"), max_steps=60, per_device_train_batch_size=64, save_steps=0, disable_tqdm=True
    )
    trainer = SAETrainer(SAEConfig(hidden_size=store.hidden_size, top_k=8), arguments, store)
    trainer.train()
    model = VS2CLIPForZeroShot(clip, trainer.model.cpu().eval(), gate=0.5)
    model.save_pretrained(folder / "model", full=True)
    for part in load_processing(DEMO_CLIP):
        part.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def space():
    """The modules of the Space, as its app imports them."""
    sys.path.insert(0, str(SPACE))
    try:
        import looks
        import playground

        yield playground, looks
    finally:
        sys.path.remove(str(SPACE))


@pytest.fixture(scope="module")
def playground(space, checkpoint, digits):
    return space[0].Playground(checkpoint, digits, LABELS)


def test_the_page_says_what_the_pipeline_says(playground, checkpoint, digits):
    """A demonstration with numbers of its own would demonstrate nothing; the method that `recommend` names has to be tried
    there, and none that is offered may fail."""
    classifier = hf_vs2.zero_shot_classifier(checkpoint, templates="single")
    steered, first, others = [], digits[0]["image"], list(playground.methods)
    assert others.pop(0) == "vs2" and others
    asked = [(image, True, {}) for image in digits[:12]["image"]] + [(first, False, {"method": one}) for one in others]
    for image, gate, more in asked:
        found = playground.explain(file_of(image), LABELS, 2.0, 3.0, gate, **more)
        scores = dict(zip(LABELS, found.steered_scores[0].softmax(-1).tolist(), strict=True))
        for one in classifier(image, list(LABELS), gamma=2.0, lambda_=3.0, **({} if gate else {"gate": None}), **more):
            assert scores[one["label"]] == pytest.approx(one["score"], abs=1e-5), more
        steered.append(bool(found.steered[0]))
    assert 0 < sum(steered[:12]) < 12, "the gate must have had something to do"
    with pytest.raises(ValueError, match="no method of this page"):
        playground.explain(file_of(first), LABELS, 2.0, 3.0, False, "nonsense")


def test_the_checkpoints_own_gammas_stay(space, checkpoint, digits, tmp_path):
    """A checkpoint that amplifies some latents only must not be shown as if it amplified all."""
    model = VS2CLIPForZeroShot.from_pretrained(checkpoint)
    gammas = torch.linspace(0.5, 3, model.sae.config.num_latents)
    model.set_steering(gamma=gammas, gate=None)
    model.save_pretrained(tmp_path, full=True)
    for part in load_processing(DEMO_CLIP):
        part.save_pretrained(tmp_path)
    own = space[0].Playground(tmp_path)
    assert own.has_own_gammas and not own.has_gate
    image = file_of(digits[0]["image"])
    first, second = (own.explain(image, LABELS, gamma, model.steering_settings.lambda_, False) for gamma in (1.0, 3.0))
    assert torch.equal(first.steered_scores, second.steered_scores)
    expected = model.explain_from_cls(own._row(image), own._embed(LABELS), LABELS)
    torch.testing.assert_close(first.steered_scores, expected.steered_scores)


def test_an_image_and_its_labels_are_encoded_once(playground, digits):
    """A slider that encodes the image again at every move is no slider."""
    calls = []
    towers = [playground.model.clip.vision_model, playground.model.clip.text_model]
    hooks = [tower.register_forward_pre_hook(lambda *_: calls.append(1)) for tower in towers]
    try:
        for gamma in (1.0, 1.5, 2.0):
            playground.explain(file_of(digits[99]["image"]), ("only", "here"), gamma, 2.0, True)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2


def test_a_siglip_is_shown_with_its_own_probabilities_and_methods(space, checkpoint, digits):
    """It scores each label by itself: a softmax of its scores is no probability, and what shares images out among the
    labels can't be chosen."""
    module, looks = space
    playground = module.Playground(checkpoint)
    assert "anchored_prototypes" in playground.methods
    playground.model.clip.logit_bias = torch.nn.Parameter(torch.zeros(()))
    assert "anchored_prototypes" not in playground.methods and "vs2" in playground.methods
    found = playground.explain(file_of(digits[0]["image"]), LABELS, gamma=2.0, lambda_=3.0, gate=False)
    assert looks.percent(found.steered_scores[0].sigmoid().max()) in looks.bars(found)


def test_latents_come_with_the_images_that_activate_them(playground, digits):
    """The wrong pictures beside a latent would explain it wrongly."""
    rows = torch.cat([playground._row(file_of(image)) for image in digits["image"]])
    values, indices = playground.model.sae.encode(rows)
    latent = int(indices[0, values[0].argmax()])
    dense = torch.zeros(len(rows), playground.model.sae.W_dec.shape[0]).scatter(1, indices, values.detach())
    best = dense[:, latent].argsort(descending=True)[:5]
    assert dense[best[0], latent] > 0
    found = playground.strongest_images(latent)
    assert found and found[0].tobytes() == digits[int(best[0])]["image"].convert("RGB").tobytes()
    never = int((dense == 0).all(0).nonzero()[0])
    assert playground.strongest_images(never) == []


def test_labels_are_read_as_people_write_them(space):
    """A label twice would share its probability with itself, and one of a book's length would fill the log."""
    playground, _ = space
    assert playground.read_labels(" bus, oak tree,\n bus ,tractor\n") == ("bus", "oak tree", "tractor")
    refused = {
        "": "at least two",
        "bus, bus": "at least two",
        ",".join(map(str, range(300))): "300 labels are too many",
    }
    for text, message in (refused | {"bus, " + "o" * 999: "A label of 999 letters"}).items():
        with pytest.raises(ValueError, match=message):
            playground.read_labels(text)


def test_a_checkpoint_that_keeps_plain_clip_answers_by_it(space, playground, digits, monkeypatch):
    """`adapt` and `recommend` choose plain CLIP often: the page must not answer by another method, unasked."""
    monkeypatch.setattr(playground, "defaults", replace(playground.defaults, method="none", gate=None))
    assert next(iter(playground.methods)) == "none"
    found = playground.explain(file_of(digits[0]["image"]), LABELS, 1.5, 2.1, False)
    assert torch.equal(found.plain_scores, found.steered_scores)
    assert "plain CLIP, which is this checkpoint's method" in space[1].verdict(found, method_acts=False)


def test_words_of_strangers_stay_words(space, playground, digits):
    """A label is shown to whoever looks at the page; it must not run there."""
    _, looks = space
    found = playground.explain(file_of(digits[0]["image"]), LABELS, 1.5, 2.1, False)
    html = looks.verdict(found) + looks.note("<b>bold") + looks.bars(found) + looks.latents(found, 4, playground)
    assert "&lt;b&gt;bold" in html and "<b>bold" not in html


@contextmanager
def running(folder, **settings):
    """The app as people start it, in a process of its own: its address and its log."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VS2_", "GRADIO_"))}
    environment |= {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": str(folder / "uploads"), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(SPACE / "app.py")], env=environment | settings, stdout=log, stderr=log
        )
    try:
        # The last line comes when gradio has asked the page itself.
        while "To create a public link" not in (folder / "log").read_text() and process.poll() is None:
            time.sleep(0.2)
        assert process.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}", folder / "log"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(checkpoint, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("running")
    (folder / "images").mkdir()
    for number, image in enumerate(digits[:20]["image"]):
        image.save(folder / "images" / f"{number:02}.png")
    (folder / "words.txt").write_text("\n".join(LABELS), encoding="utf-8")
    settings = {"VS2_CHECKPOINT": str(checkpoint), "VS2_IMAGES": str(folder / "images"), "VS2_LABELS": "zero, one"}
    settings["VS2_WORDS"] = str(folder / "words.txt")
    with running(folder, **settings) as (url, _):
        yield url


def test_the_running_app_answers_its_client(address, playground, digits, tmp_path):
    """What the Hub runs is the process, not the module; programs call it by name."""
    from gradio_client import Client, handle_file

    digits[3]["image"].save(tmp_path / "digit.png")
    client = Client(address, verbose=False)

    def ask(labels, *settings):
        return client.predict(handle_file(str(tmp_path / "digit.png")), labels, *settings, api_name="/steer")

    verdict, bars, latents, facts = ask(", ".join(LABELS), 2.0, 3.0, False)
    image = (tmp_path / "digit.png").read_bytes()
    expected = playground.explain(image, LABELS, 2.0, 3.0, False).to_dict(8)[0]
    assert [label["label"] for label in facts["labels"]] == list(LABELS)
    for one, other in zip(facts["labels"], expected["labels"], strict=True):
        assert one["steered_probability"] == pytest.approx(other["steered_probability"], abs=1e-5)
    assert "verdict" in verdict and "bar steered" in bars and "<img" in latents
    for label in ask(", ".join(LABELS), 1.0, 3.0, False)[-1]["labels"]:
        assert label["steered_probability"] == pytest.approx(label["plain_probability"], abs=1e-5)
    with pytest.raises(Exception, match="at least two labels"):
        ask("one", 2.0, 3.0, False)


def test_several_clients_at_once_get_their_own_answers(address, playground, digits, tmp_path):
    """Each person has an image, sliders and a gate of their own; the process has one model."""
    from gradio_client import Client, handle_file

    images = [file_of(image) for image in digits[:4]["image"]]
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)

    def ask(number):
        """As one person, three times."""
        client, found = Client(address, verbose=False), []
        for gamma, lambda_, gate in ((1.0 + number / 2, 2.0, False), (2.0, 1.0 + number, True), (1.5, 2.0, False)):
            file = handle_file(str(tmp_path / f"{number}.png"))
            facts = client.predict(file, ", ".join(LABELS), gamma, lambda_, gate, api_name="/steer")[-1]
            found.append((facts, playground.explain(images[number], LABELS, gamma, lambda_, gate).to_dict(8)[0]))
        return found

    with ThreadPoolExecutor(4) as pool:
        answers = [answer for found in pool.map(ask, range(4)) for answer in found]
    assert len({str(facts["labels"]) for facts, _ in answers}) > 4, "they must have asked for different things"
    for facts, expected in answers:
        assert facts["steered"] == expected["steered"]
        for one, other in zip(facts["labels"], expected["labels"], strict=True):
            assert one["steered_probability"] == pytest.approx(other["steered_probability"], abs=1e-5)


def png_of_zeros(size):
    """A black image, `size` x `size` of one bit a pixel: small as a file, whatever its size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(bytes((1 + (size + 7) // 8) * size))
    header = struct.pack(">IIBBBBB", size, size, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_images_that_cannot_be_used_are_refused_in_words(address, digits, tmp_path):
    """Gradio by itself says "Error", and nothing else."""
    import httpx
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    whole = file_of(digits[0]["image"])
    files = {
        "not an image": (b"hello", "no image format"),
        "cut": (whole[: len(whole) // 2], "cannot be read"),
        "a bomb": (png_of_zeros(20_000), "too large"),
    }
    for name, (content, message) in files.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(Exception, match=message) as caught:
            client.predict(handle_file(str(tmp_path / f"{name}.png")), "one, two", 1.5, 2.0, False, api_name="/steer")
        assert "uploads" not in str(caught.value), "a path of the server is nobody's business"
    with pytest.raises(Exception, match="Give an image first"):
        client.predict(None, "one, two", 1.5, 2.0, False, api_name="/steer")
    elsewhere = tmp_path / "elsewhere.png"  # an image on the server that nobody uploaded
    elsewhere.write_bytes(whole)
    # Not through the client, which would upload it.
    settings = ["one, two", 1.5, 2.0, False]

    def answer(path):
        """The last event of a call as any program can make it."""
        image = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        call = httpx.post(f"{address}/gradio_api/call/steer", json={"data": [image, *settings]}).json()["event_id"]
        return httpx.get(f"{address}/gradio_api/call/steer/{call}", timeout=30).text.split("event: ")[-1].split()[0]

    with open(elsewhere, "rb") as file:
        (uploaded,) = httpx.post(f"{address}/gradio_api/upload", files={"files": file}).json()
    assert answer(uploaded) == "complete"
    assert answer(elsewhere) == "error"


@pytest.mark.slow
def test_without_settings_it_makes_the_demos_checkpoint_once(tmp_path):
    """The one command of its README; nobody wants to wait for it a second time."""
    from gradio_client import Client, handle_file

    from hf_vs2.demo.data import load_handwriting

    load_handwriting()[94]["image"].save(tmp_path / "digit.png")
    for start in range(2):
        with running(tmp_path, VS2_DEMO_FOLDER=str(tmp_path / "demo"), HF_HUB_OFFLINE="1") as (url, log):
            assert ("Making the demo's checkpoint" in log.read_text()) == (start == 0)
            client = Client(url, verbose=False)
            facts = client.predict(
                handle_file(str(tmp_path / "digit.png")), "two, seven", 1.5, 2.1, True, api_name="/steer"
            )[-1]
            answer = max(facts["labels"], key=lambda label: label["steered_probability"])
            assert facts["steered"] and answer["label"] == "seven"


@needs_browser
def test_the_page_in_a_browser(address, playground, digits, tmp_path):
    """The bars come, the sliders and switches move them, and the page asks nobody but the app."""

    def can_be_seen_to_move(file):
        """Held back by the gate, and of probabilities that are not 100 % whatever is done."""
        asked = [(1.5, 2.1, True), (1.5, 2.1, False), (4.0, 2.1, False)]
        shut, *opened = (playground.explain(file, ("zero", "one"), *settings) for settings in asked)
        before, after, further = (found.steered_scores[0].softmax(-1)[0].item() for found in (shut, *opened))
        return not shut.steered[0] and abs(after - before) > 0.01 and abs(further - after) > 0.01

    held_back = next(filter(can_be_seen_to_move, (file_of(image) for image in digits["image"])))
    (tmp_path / "held_back.png").write_bytes(held_back)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 400, "height": 900})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        # It opens with an example that is answered already, where a phone shows it.
        bars, said = page.locator(".vs2 .row"), page.locator("#answer .verdict")
        bars.first.wait_for(timeout=30_000)
        box = said.bounding_box()
        assert box["y"] + box["height"] <= 900, "the answer begins below the screen of a phone"
        page.get_by_label("Remove Image").click()
        page.locator("#answer", has_text="Give an image").wait_for(timeout=30_000)
        page.locator("#picture input[type=file]").set_input_files(str(tmp_path / "held_back.png"))
        bars.first.wait_for(timeout=30_000)

        def changed(act):
            """What the bars say once `act` has had its effect, without a press on the button."""
            before = "".join(bars.all_inner_texts())
            act()
            page.wait_for_function(
                "old => [...document.querySelectorAll('.vs2 .row')].map(row => row.innerText).join('') != old",
                arg=before,
            )
            return bars.all_inner_texts()

        assert "the gate is shut" in said.inner_text()
        changed(page.get_by_label("Gate").uncheck)
        slider = page.locator("input[type=range]").first

        def press():
            """gamma, by the keys of a keyboard."""
            slider.focus()
            for _ in range(15):
                page.keyboard.press("ArrowRight")

        def type_number():
            page.locator("input[type=number]").first.fill("1")

        changed(press)

        # The latents that moved the answer, by name; one that is off moves it no more.
        switches = page.locator("#switches").get_by_role("checkbox")
        switches.first.wait_for()
        named = page.locator(".vs2 .latent .name").all_inner_texts()
        assert named and all(any(word in name for word in LABELS) for name in named)
        changed(switches.first.check)
        page.locator("#answer", has_text="1 latent switched off").wait_for()
        changed(switches.first.uncheck)
        changed(type_number)

        # A mistake is said in the answer's place, and nothing of the answer before it stays.
        page.get_by_label("Labels").fill("cat")
        page.get_by_label("Labels").blur()
        page.locator("#answer", has_text="at least two labels").wait_for(timeout=30_000)
        assert bars.count() == 0
        page.get_by_label("Labels").fill("zero, one")
        page.get_by_label("Labels").blur()
        bars.first.wait_for(timeout=30_000)

        def rename():
            page.get_by_label("Labels").fill("cat, <i>dog</i>, bird")
            page.get_by_label("Labels").blur()

        assert any("<i>dog</i>" in row for row in changed(rename))
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, "a phone would have to scroll sideways"
    assert not errors
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_the_page(address, scheme):
    """Whoever can't see well, or hears the page, must be able to use it."""
    with chromium() as browser:
        page = browser.new_page(color_scheme=scheme)
        page.goto(address)
        page.locator(".vs2 .latent").first.wait_for(timeout=30_000)
        assert not axe(page)


def test_a_latent_that_is_off_is_as_if_it_were_0(playground, digits):
    """A switch that did anything else would tell a story about the latent that is not true."""
    image = file_of(digits[0]["image"])
    found = playground.explain(image, LABELS, 2.0, 3.0, False)
    off = [latent["latent"] for latent in found.top(0, 2)]
    edited = playground.explain(image, LABELS, 2.0, 3.0, False, off=off)
    model, row = playground.model, playground._row(image)
    with model.steering(gamma=2.0, lambda_=3.0, gate=None, fvu_threshold=None), model.editing(suppress=off):
        expected = model.explain_from_cls(row, playground._embed(LABELS), LABELS)
    torch.testing.assert_close(edited.steered_scores, expected.steered_scores)
    assert (edited.steered_scores - found.steered_scores).abs().max() > 0.01
