"""One image is one image: turned or not, from every place that people name, and however thin it is. That it is the same at every
door is tested in tests/test_every_door.py."""

import base64
import contextlib
import io
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import run
from image_stores import make_processor
from pictures import encoded, exif, picture
from PIL import Image, PngImagePlugin
from transformers import CLIPImageProcessorPil
from transformers.pipelines.pt_utils import KeyDataset

import hf_vs2
from hf_vs2 import VS2CLIPForZeroShot, extract_activations
from hf_vs2.data import UnreadableImageError, open_image
from hf_vs2.data.images import heif_is_readable
from hf_vs2.data.pixels import pixels_needed, reading_fast, reads_fast, uint8_pixels
from hf_vs2.data.web import read_url
from hf_vs2.encoders.processing import load_processing


LABELS = ["three", "nine"]


# Turned images

# What an image with this tag is to be shown as.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def turned(file_format: str, orientation: int) -> bytes:
    image, tags = Image.fromarray(picture()), exif(orientation)
    if file_format == "XMP":  # in a PNG without EXIF
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
        return encoded(image, "PNG", pnginfo=text)
    options = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "MPO": {"quality": 100, "subsampling": 0, "save_all": True, "append_images": [Image.new("RGB", image.size)]},
        "WEBP": {"lossless": True},
    }
    return encoded(image, file_format, exif=tags, **options.get(file_format, {}))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "XMP"])
def test_a_turned_image_is_turned_once(file_format, tmp_path):
    """`classify` turned each phone photo twice: what was upright lost its tag nowhere, and the next reader turned it
    again."""
    for orientation, upright in UPRIGHT.items():
        content = turned(file_format, orientation)
        path = tmp_path / f"{orientation}.{file_format.lower()}"
        path.write_bytes(content)
        for value in (path, content, {"bytes": content, "path": None}, Image.open(path)):
            opened = open_image(value)
            found, expected = np.asarray(opened).astype(int), upright(picture()).astype(int)
            assert found.shape == expected.shape and np.abs(found - expected).max() <= 12, (orientation, type(value))
            assert not opened.info and not opened.getexif()
            for again in (open_image(opened), open_image(np.asarray(opened)), open_image(encoded(opened, "PNG"))):
                assert np.array_equal(np.asarray(again), np.asarray(opened))


def test_an_opened_image_belongs_to_the_caller():
    """A thumbnail made of it must not shrink the user's own image, nor what was set there be lost."""
    mine = Image.fromarray(picture())
    mine.info["note"] = "mine"
    open_image(mine).thumbnail((4, 4))
    assert mine.size == (36, 24) and mine.info == {"note": "mine"}
    ones = torch.ones(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)  # which numpy can't take
    assert (np.asarray(open_image(ones)) == 255).all()


# Every door


@pytest.fixture(scope="module")
def model(checkpoint):
    return VS2CLIPForZeroShot.from_pretrained(checkpoint, gate=None)


def test_an_image_is_one_line_of_the_table(checkpoint, tmp_path, capsys, monkeypatch):
    """Line breaks in labels and file names broke the table apart, and other letters could steer the terminal."""
    file = tmp_path / "a\nb\x1b[2J.png"
    Image.fromarray(picture()).save(file)
    monkeypatch.delenv("COLUMNS", raising=False)  # which would cut the name
    head, line = run(
        capsys, "classify", file, "--checkpoint", checkpoint, "--labels", "se\nven", "\x1btwo", "--top_k", 2
    ).splitlines()
    assert head.startswith("image") and r"a\nb\x1b[2J.png" in line and "\x1b" not in line
    assert "se ven" in line and r"\x1btwo" in line, "both labels stand on the image's line"


@pytest.mark.parametrize(("mode", "changes"), [("RGB", False), ("RGBA", False), ("L", True), ("1", True)])
def test_the_mode_that_a_data_set_asks_for_is_what_is_read(mode, changes, model, clip_path, tmp_path):
    """`datasets.Image(mode="L")` says that colours are not to be looked at. Where pixels change, a store made before
    is another."""
    images = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    plain = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    asked = plain.cast_column("image", datasets.Image(mode=mode))
    converted = datasets.Dataset.from_list([{"image": image.convert(mode)} for image in images])
    tokenizer, processor = load_processing(clip_path)

    def store(rows):
        return extract_activations(model.clip, rows, tmp_path, image_processor=processor, progress=False)

    before, found, stream = store(plain), store(asked), store(asked.to_iterable_dataset())
    assert torch.equal(found.tensor(), store(converted).tensor()) and torch.equal(found.tensor(), stream.tensor())
    assert (found.path != before.path) is changes and (not torch.equal(found.tensor(), before.tensor())) is changes
    options = {"tokenizer": tokenizer, "image_processor": processor, "candidate_labels": LABELS}
    classifier = hf_vs2.zero_shot_classifier(model, **options)
    undecoded = asked.cast_column("image", datasets.Image(mode=mode, decode=False))
    for column in (asked["image"], undecoded["image"], KeyDataset(undecoded, "image")):
        for answer, expected in zip(classifier(column), classifier([i.convert(mode) for i in images]), strict=True):
            assert answer == expected


# Thin images


def test_fast_reading_changes_pixels_by_little_and_no_image_of_the_caller():
    """A large JPEG comes at a fraction of its size, and resizing makes the crop alone; another format's pixels move by
    one level. An image that the caller has opened keeps its size, and the setting is saved with the processor."""
    processor = CLIPImageProcessorPil()
    fast = reading_fast(processor)
    assert not reads_fast(processor) and pixels_needed(processor) is None
    image = Image.fromarray(picture(1600, 1204))
    for file_format, given, size, levels in (
        ("JPEG", image, (800, 602), 3),
        ("JPEG", image.crop((0, 0, 1599, 1204)), (1599, 1204), 1),
        ("PNG", image, (1600, 1204), 1),
    ):
        content = encoded(given, file_format)
        opened = Image.open(io.BytesIO(content))
        assert open_image(content, at_least=pixels_needed(fast)).size == size
        assert open_image(opened, at_least=pixels_needed(fast)).size == opened.size == given.size
        exact = uint8_pixels(open_image(content), processor, "it").int()
        pixels = uint8_pixels(open_image(content, at_least=pixels_needed(fast)), fast, "it").int()
        assert 0 < (pixels - exact).abs().max() <= levels, file_format
    assert CLIPImageProcessorPil.from_dict(fast.to_dict()).fast_decode is True


@pytest.mark.parametrize("size", [(1, 301), (2, 600), (3, 1001), (45, 5001), (301, 30_001)])
def test_a_threadlike_image_is_answered_by_its_middle(size, monkeypatch):
    """205 bytes became 11 GB, resized whole before the crop. What is cut before it is resized must show the same
    pixels."""
    processor = CLIPImageProcessorPil()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for array in (pixels, pixels.swapaxes(0, 1)):
        image = Image.fromarray(np.ascontiguousarray(array))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        whole = uint8_pixels(image, processor, "thread").int()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000_000)
        middle = uint8_pixels(image, processor, "thread").int()
        assert whole.shape == middle.shape == (3, 224, 224)
        # Noise: what a hundredth of a pixel changes is as large as can be.
        assert (whole - middle).abs().max() <= 2 and (whole - middle).abs().float().mean() < 0.2
    monkeypatch.undo()
    for thinnest in ((1, 65_000), (65_000, 1)):
        assert uint8_pixels(Image.new("RGB", thinnest, "red"), processor, "thread").shape == (3, 224, 224)
    with pytest.raises(UnreadableImageError, match="photo 3 is 1 x 65000: resized to a shorter side of 224"):
        uint8_pixels(Image.new("RGB", (1, 65_000)), CLIPImageProcessorPil(do_center_crop=False), "photo 3")


def test_what_was_read_before_keeps_its_bits():
    """Or stores made by an earlier version would hold rows of other images, and be taken for these."""
    processor = CLIPImageProcessorPil()
    for width, height in ((640, 64), (1, 401), (600, 2), (3, 301), (900, 7), (3000, 30), (224, 30_000), (30_001, 300)):
        ordinary = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
        before = processor(ordinary, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(uint8_pixels(ordinary, processor, "ordinary"), before), ordinary.size


# Where images are


def test_paths_and_addresses_of_files_are_read_or_refused_by_name(tmp_path, monkeypatch):
    """A `file:` address was taken for a path, `ftp:` and `zip:` were handed on, a pipe hung for ever, a folder was
    called base64."""
    content = encoded(Image.fromarray(picture()), "PNG")
    odd = tmp_path / "a b#c%20é?.png"
    odd.write_bytes(content)
    (tmp_path / "abcd").write_bytes(content)  # looks like base64, too
    monkeypatch.chdir(tmp_path)
    text = base64.b64encode(content).decode()
    for value in (
        *(odd.as_uri(), odd.as_uri().replace("file://", "file://localhost"), odd.as_uri().replace("file://", "FILE:")),
        *("abcd", f"data:image/png;base64,{text}", text, base64.encodebytes(content).decode()),
    ):
        assert np.array_equal(np.asarray(open_image(value)), picture()), value
    os.mkfifo(tmp_path / "pipe.png")
    for value, message in (
        ("nothing.jpg", r"the image \(nothing.jpg\) cannot be read \(FileNotFoundError: No such file"),
        ("abce", "No such file"),
        ("two\nlines.png", r"two\\nlines.png"),
        (Path("http://a/b.png"), "No such file"),
        ("file:///no where.png", "No such file"),
        ("file://elsewhere/a.png", "another computer"),
        ("ftp://127.0.0.1/a.png", "begin with ftp: are not read.*http:, https: or file:"),
        ("zip://a.png::b.zip", "begin with zip: are not read"),
        ("simplecache::http://127.0.0.1/a.png", "begin with simplecache: are not read"),
        (str(tmp_path), "it is a folder"),
        ("pipe.png", "it is a pipe or a device"),
        (tmp_path / "pipe.png", "it is a pipe or a device"),
        ({"bytes": None, "path": "pipe.png"}, "it is a pipe or a device"),
        ("/dev/zero", "it is a pipe or a device"),
        ("data:image/png;base64,oh no", "cannot be read"),
    ):
        with pytest.raises(UnreadableImageError, match=message):
            open_image(value)


def test_a_file_that_cannot_be_read_is_skipped_where_that_is_asked_for(model, tmp_path):
    """The images' fingerprint is taken before any image is opened; it must not stop at a file without permission, or a
    pipe."""
    for number in range(3):
        Image.fromarray(picture(seed=number)).save(tmp_path / f"{number}.png")
    os.mkfifo(tmp_path / "pipe.png")
    # There, but not to be read, for the system's administrator neither.
    bad = ["/proc/self/mem", str(tmp_path / "pipe.png"), str(tmp_path / "gone.png")]
    names = [*(str(tmp_path / f"{number}.png") for number in range(3)), *bad]
    rows = datasets.Dataset.from_dict({"image": names}).cast_column("image", datasets.Image())
    options = {"image_processor": make_processor(), "progress": False}
    store = extract_activations(model.clip, rows, tmp_path / "s", on_error="skip", **options)
    assert len(store.tensor()) == 3 and [item["path"] for item in store.metadata["skipped"]] == bad
    with pytest.raises(UnreadableImageError, match=r"image 3 \(/proc/self/mem\)"):
        extract_activations(model.clip, rows.select([0, 1, 2, 3]), tmp_path / "s", **options)


def test_a_photo_of_a_phone_is_read_or_the_way_out_is_named():
    """HEIC is what phones take; Pillow alone can't read it, and said no more than that."""
    if not heif_is_readable():
        content = b"\0\0\0\x18ftypheic" + b"\0" * 40
        for value in (content, "data:image/heic;base64," + base64.b64encode(content).decode()):
            with pytest.raises(UnreadableImageError, match="photo 3 cannot be read .*pip install pillow-heif"):
                open_image(value, "photo 3")
        return
    import pillow_heif

    pillow_heif.register_heif_opener()
    content = encoded(Image.fromarray(picture()), "HEIF", quality=-1, chroma=444)
    found = np.asarray(open_image(content)).astype(int)
    assert found.shape == picture().shape and np.abs(found - picture()).max() <= 12


# The web


class Hostile(BaseHTTPRequestHandler):
    """A web server that does what is asked for by the path."""

    def do_GET(self):
        content = encoded(Image.fromarray(picture()), "PNG")
        with contextlib.suppress(OSError):  # whoever asked has left
            what = self.path.strip("/").partition("?")[0]
            if what == "slow-head":
                for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 1000:
                    self.wfile.write(bytes([letter]))
                    time.sleep(0.05)
                return
            if what == "silence":
                time.sleep(30)
                return
            status = {"none": 404, "broken": 500, "round": 302, "to-file": 302, "moved": 301}.get(what, 200)
            self.send_response(status)
            places = {"round": "/round", "to-file": "file:///etc/passwd", "moved": "/image.png"}
            for name, value in (
                ("Location", places.get(what)),
                ("Content-Length", {"short": "9999999"}.get(what)),
                ("Content-Encoding", {"packed": "gzip"}.get(what)),
            ):
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if what == "endless":
                while True:
                    self.wfile.write(b"\0" * 2**20)
            if what == "slow":
                for letter in content:
                    self.wfile.write(bytes([letter]))
                    time.sleep(0.05)
            self.wfile.write(b"<html>no</html>" if what == "page" else content)

    def log_message(self, *_):
        """Silent."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "127.0.0.1")
            yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "the web server answers 404 Not Found"),
        ("broken", "the web server answers 500"),
        ("page", "no image format that Pillow can identify"),
        ("round", "TooManyRedirects"),
        ("to-file", "unsupported protocol"),
        ("short", "RemoteProtocolError"),
        ("packed", "sends it compressed"),
        ("endless", "sends more than 4 MiB"),
        ("slow", "no whole answer within 1.5 seconds"),
        ("slow-head", "no whole answer within 1.5 seconds"),
        ("silence", "no whole answer within 1.5 seconds"),
    ],
)
def test_a_web_server_cannot_hold_up_or_fill_up_who_asks_it(path, message, address, monkeypatch):
    """A limit for each piece let a server that drips hold a command for minutes, and nothing bounded what it sent. A
    page that says 404 was called a broken image."""
    monkeypatch.setattr("hf_vs2.data.web.MOST_BYTES", 2**22)
    in_time = 1.5 if path in ("slow", "slow-head", "silence") else 60
    started = time.monotonic()
    with pytest.raises(UnreadableImageError, match=message) as caught:
        open_image(f"{address}/{path}", timeout=in_time)
    assert f"({address}/{path})" in str(caught.value)
    assert time.monotonic() - started < in_time + 10


def test_the_web_is_read_from_anywhere(address):
    """Also in a notebook, whose thread runs an event loop, and in several threads."""
    import asyncio

    async def in_a_notebook():
        return np.asarray(open_image(f"{address}/moved"))

    assert np.array_equal(asyncio.run(in_a_notebook()), picture())
    row = {"bytes": None, "path": address.replace("http", "HTTP") + "/image.png"}
    assert np.array_equal(np.asarray(open_image(row)), picture())
    with pytest.raises(Exception, match="onnect"):
        read_url("http://127.0.0.1:1/image.png", 20)
