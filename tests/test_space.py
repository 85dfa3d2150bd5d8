"""The Space: what it says of an image is what the library says, for everybody at once, and the page shows it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

import hf_vs2
from hf_vs2 import SAEConfig, SAETrainer, SAETrainingArguments, VS2CLIPForZeroShot, extract_activations
from hf_vs2.processing import load_processing


pytest.importorskip("sklearn")

SPACE = Path(__file__).parents[1] / "examples" / "space"
DEMO_CLIP = Path(hf_vs2.__file__).parent / "demo_assets"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
LABELS = ("zero", "one", "two", "<b>bold</b>")


@pytest.fixture(scope="module")
def digits():
    from hf_vs2.demo_data import load_handwriting

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
    return space[0].Playground(checkpoint, digits)


def test_it_says_what_the_pipeline_says(playground, checkpoint, digits):
    """A demonstration with numbers of its own would demonstrate nothing."""
    classifier = hf_vs2.zero_shot_classifier(checkpoint, templates="single")
    steered = []
    for image in digits[:12]["image"]:
        found = playground.explain(image, LABELS, gamma=2.0, lambda_=3.0, gate=True)
        scores = dict(zip(LABELS, found.steered_scores[0].softmax(-1).tolist(), strict=True))
        for one in classifier(image, list(LABELS), gamma=2.0, lambda_=3.0):
            assert scores[one["label"]] == pytest.approx(one["score"], abs=1e-5)
        steered.append(bool(found.steered[0]))
    assert 0 < sum(steered) < 12, "the gate must have had something to do"


def test_people_do_not_get_each_others_settings(playground, digits):
    """The model is one, its settings are everybody's: without care one person's slider moves another's result."""
    image = digits[0]["image"]
    settings = [(gamma, lambda_) for gamma in (1.0, 1.5, 3.0) for lambda_ in (0.5, 2.0)] * 6

    def ask(one):
        return playground.explain(image, LABELS, *one, False).steered_scores

    expected = {one: ask(one) for one in set(settings)}
    before = playground.model.steering_settings
    with ThreadPoolExecutor(6) as pool:
        for one, scores in zip(settings, pool.map(ask, settings), strict=True):
            assert torch.equal(scores, expected[one])
    assert playground.model.steering_settings == before
    plain = playground.explain(image, LABELS, 1.0, 2.0, False)
    torch.testing.assert_close(plain.steered_scores, plain.plain_scores, rtol=0, atol=1e-5)


def test_an_image_and_its_labels_are_encoded_once(playground, digits):
    """A slider that encodes the image again at every move is no slider."""
    calls = []
    towers = [playground.model.clip.vision_model, playground.model.clip.text_model]
    hooks = [tower.register_forward_pre_hook(lambda *_: calls.append(1)) for tower in towers]
    try:
        for gamma in (1.0, 1.5, 2.0):
            playground.explain(digits[99]["image"], ("only", "here"), gamma, 2.0, True)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2


def test_latents_come_with_the_images_that_activate_them(playground, digits):
    """The wrong pictures beside a latent would explain it wrongly."""
    rows = torch.cat([playground._row(image) for image in digits["image"]])
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
    playground, _ = space
    assert playground.read_labels(" bus, oak tree,\n bus ,tractor\n") == ("bus", "oak tree", "tractor")
    for text, message in (("", "at least two"), ("bus, bus", "at least two"), (",".join(map(str, range(300))), "300")):
        with pytest.raises(ValueError, match=message):
            playground.read_labels(text)


def test_words_of_strangers_stay_words(space, playground, digits):
    """A label is shown to whoever looks at the page; it must not run there."""
    _, looks = space
    found = playground.explain(digits[0]["image"], LABELS, 1.5, 2.1, False)
    html = looks.verdict(found) + looks.bars(found) + looks.latents(found, 4, playground.strongest_images)
    assert "&lt;b&gt;bold" in html and "<b>bold" not in html


@pytest.fixture(scope="module")
def address(checkpoint, digits, tmp_path_factory):
    """The app as people start it, in a process of its own."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("running")
    (folder / "images").mkdir()
    for number, image in enumerate(digits[:20]["image"]):
        image.save(folder / "images" / f"{number:02}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "GRADIO_SERVER_PORT": port,
        "VS2_CHECKPOINT": str(checkpoint),
        "VS2_LABELS": "zero, one",
    }
    environment |= {"VS2_IMAGES": str(folder / "images"), "GRADIO_TEMP_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(SPACE / "app.py")], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if "Running on local URL" in (folder / "log").read_text() or process.poll() is not None:
                break
            time.sleep(0.2)
        assert process.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_the_running_app_answers_its_client(address, playground, digits, tmp_path):
    """What the Hub runs is the process, not the module; programs call it by name."""
    from gradio_client import Client, handle_file

    digits[3]["image"].save(tmp_path / "digit.png")
    client = Client(address, verbose=False)

    def ask(labels, *settings):
        return client.predict(handle_file(str(tmp_path / "digit.png")), labels, *settings, api_name="/steer")

    verdict, bars, latents, facts = ask(", ".join(LABELS), 2.0, 3.0, False)
    expected = playground.explain(digits[3]["image"], LABELS, 2.0, 3.0, False).to_dict(8)[0]
    assert [label["label"] for label in facts["labels"]] == list(LABELS)
    for one, other in zip(facts["labels"], expected["labels"], strict=True):
        assert one["steered_probability"] == pytest.approx(other["steered_probability"], abs=1e-5)
    assert "verdict" in verdict and "bar steered" in bars and "<img" in latents
    with pytest.raises(Exception, match="at least two labels"):
        ask("one", 2.0, 3.0, False)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(address):
    """The bars come, the sliders move them, and the page asks nobody but the app."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(
            executable_path=CHROMIUM, args=[*flags.split(), "--disable-component-update", "--disable-sync"]
        )
        page = browser.new_page(viewport={"width": 400, "height": 900})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.locator("#picture input[type=file]").set_input_files(
            str(SPACE.parents[1] / "docs" / "images" / "explain.png")
        )
        page.locator(".vs2 .bar.steered").first.wait_for(timeout=30_000)
        before = page.locator(".vs2 .row").all_inner_texts()
        page.get_by_label("Gate").uncheck()
        number = page.get_by_role("spinbutton").first
        number.fill("4")
        number.press("Enter")
        page.get_by_role("button", name="Steer").click()
        page.wait_for_function(
            "old => [...document.querySelectorAll('.vs2 .row')].map(r => r.innerText).join() != old",
            arg=",".join(before),
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, "a phone would have to scroll sideways"
        browser.close()
    assert not errors
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
