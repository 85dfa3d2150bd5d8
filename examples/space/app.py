"""A Space that shows what steering does to an image of yours: `python app.py`.

Without settings it makes and shows the demo's checkpoint, offline. `VS2_CHECKPOINT` names another, a folder or a Hub id, and
`VS2_IMAGES` images (a folder, or a data set's id) to show what activates a latent; `VS2_LABELS` are the labels to begin
with, `VS2_WORDS` a file with a word a line to name latents with (without it those labels and common words), `VS2_ATLAS`
the address of its atlas, to which latents are linked.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr  # noqa: E402
from huggingface_hub.constants import HF_HOME  # noqa: E402
from looks import CSS, HINT, WORDS, bars, latents, likeliest, note, verdict  # noqa: E402
from PIL import Image  # noqa: E402
from playground import SHOWN_LATENTS, Playground, demo_checkpoint, read_labels  # noqa: E402

from hf_vs2 import VS2Explanation, load_images  # noqa: E402
from hf_vs2.data.inputs import NamedImages  # noqa: E402
from hf_vs2.latent_names import common_words, read_vocabulary  # noqa: E402
from hf_vs2.methods import METHODS  # noqa: E402


HOUR, DAY = 3600, 86400
LARGEST_FILE = "30mb"
ATLAS = os.environ.get("VS2_ATLAS", "")


def make_playground() -> tuple[Playground, str, list[Image.Image]]:
    """The playground, the labels to begin with and a few images to try."""
    checkpoint, images, labels = (os.environ.get(f"VS2_{name}") for name in ("CHECKPOINT", "IMAGES", "LABELS"))
    if checkpoint is None:
        from hf_vs2.demo.data import DIGIT_NAMES, load_handwriting

        digits = load_handwriting()
        folder = Path(os.environ.get("VS2_DEMO_FOLDER", Path(HF_HOME) / "hf_vs2_space"))
        examples = [digits[place]["image"] for place in (94, 0, 15, 31, 77)]
        playground = Playground(demo_checkpoint(folder), digits, DIGIT_NAMES)  # all words that its CLIP was taught
        return playground, labels or ", ".join(DIGIT_NAMES), examples
    shown = load_images(images, split="train[:1000]") if images else None
    files = NamedImages(shown["image"] if shown else [])
    examples = [files[place].read() for place in range(min(5, len(files)))]
    labels, words = labels or "cat, dog, bird", os.environ.get("VS2_WORDS")
    named = read_vocabulary(words) if words else list(dict.fromkeys([*read_labels(labels), *common_words()]))
    return Playground(checkpoint, shown, named), labels, examples


class Settings(NamedTuple):
    """What a person sets beside the image. Programs give no method, which is the checkpoint's, and switch nothing off."""

    labels: str
    gamma: float
    lambda_: float
    gate: bool
    method: str | None = None
    off: Sequence[int] = ()


class Page:
    """What the listeners of the page do: `answer` for programs, which are told of a mistake by an error, and `show` for
    people, who read it in the answer's place."""

    def __init__(self, playground: Playground):
        self.playground = playground

    def answer(self, path: str | None, *given: Any) -> tuple[str, str, str, Any]:
        if path is None:
            raise gr.Error("Give an image first.", print_exception=False)
        try:
            return self._answer(path, Settings(*given))[1]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show(self, path: str | None, *given: Any) -> tuple[str, str, str, Any, Any]:
        settings = Settings(*given)
        nothing = "", "", None, gr.CheckboxGroup(visible=bool(settings.off))
        if path is None:
            return note(HINT), *nothing
        try:
            found, shown = self._answer(path, settings)
        except ValueError as error:
            return note(str(error), "problem"), *nothing
        return *shown, self._switches(found, settings)

    def _answer(self, path: str, settings: Settings) -> tuple[VS2Explanation, tuple[str, str, str, Any]]:
        method, off = settings.method or next(iter(self.playground.methods)), settings.off
        if not self.playground.has_latents(method):
            off = ()
        asked = (read_labels(settings.labels), settings.gamma, settings.lambda_, settings.gate, method, off)
        found = self.playground.explain(Path(path).read_bytes(), *asked)
        threshold = self.playground.threshold(method) if settings.gate else None
        moved = latents(found, SHOWN_LATENTS, self.playground, ATLAS)
        return found, (
            verdict(found, threshold, len(off), METHODS[method].acts),
            bars(found),
            moved,
            found.to_dict(SHOWN_LATENTS)[0],
        )

    def _switches(self, found: VS2Explanation, settings: Settings) -> Any:
        """A switch for each latent that is listed, or is off."""
        if not self.playground.has_latents(settings.method):
            return gr.CheckboxGroup(visible=False)
        listed = {latent["latent"] for latent in found.top(likeliest(found), SHOWN_LATENTS)} | {*settings.off}
        choices = [
            (f"#{latent} {self.playground.name(latent, with_nearest=False)}".strip(), latent)
            for latent in sorted(listed)
        ]
        # No value: a switch that was pressed while this was computed stays as it is.
        return gr.CheckboxGroup(choices, visible=bool(choices))


def build(playground: Playground, labels: str, examples: list[Image.Image]) -> gr.Blocks:
    page = Page(playground)
    defaults, methods = playground.defaults, playground.methods
    gamma = 1.5 if playground.has_own_gammas else defaults.gamma

    with gr.Blocks(title="Visual Sparse Steering", analytics_enabled=False, delete_cache=(HOUR, DAY)) as blocks:
        gr.Markdown("# Visual Sparse Steering\nWhat does steering do to CLIP's answer? No label was used to learn it.")
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    examples[0] if examples else None,
                    type="filepath",
                    format="png",
                    label="Image",
                    height=240,
                    elem_id="picture",
                    sources=["upload", "clipboard"],
                )
                # Gradio itself would open the file here, and not tell people why it could not.
                image.preprocess = lambda file: file and file.path
                answer = gr.HTML(note(HINT), elem_id="answer")
                if examples:
                    names = [f"image {number}" for number in range(1, len(examples) + 1)]
                    gr.Examples([[one] for one in examples], [image], label="Images to try", example_labels=names)
                text = gr.Textbox(labels, label="Labels, separated by commas", lines=2)
                method = gr.Dropdown(
                    [(one.label, name) for name, one in methods.items()],
                    value=next(iter(methods)),
                    label="Method",
                    filterable=False,
                )
                factor = gr.Slider(
                    0,
                    max(4, 2 * gamma),
                    gamma,
                    step=0.1,
                    label="gamma: one for each latent, in the checkpoint"
                    if playground.has_own_gammas
                    else "gamma: how much active latents are amplified (1: not at all)",
                    interactive=not playground.has_own_gammas,
                )
                strength = gr.Slider(
                    0,
                    max(8, 2 * defaults.lambda_),
                    defaults.lambda_,
                    step=0.1,
                    label="lambda: how much of the change is added",
                )
                gate = gr.Checkbox(
                    playground.has_gate,
                    label="Gate: leave images alone that are unlike those it was made with",
                    interactive=playground.has_gate,
                )
                button = gr.Button("Steer", variant="primary")
            with gr.Column(scale=3):
                before_after = gr.HTML()
                off = gr.CheckboxGroup(
                    label="Switch latents off",
                    elem_id="switches",
                    info="Their value becomes 0: what would the answer be, had the image nothing of them?",
                    visible=False,
                )
                # A latent that is off may be none of those that were listed last.
                off.preprocess = lambda latents: latents or []
                active = gr.HTML()
                with gr.Accordion("What do these words mean?", open=False):
                    listed = "\n".join(f"- {one.label}: {one.summary}" for one in methods.values())
                    more = f", [this checkpoint's atlas]({ATLAS})" if ATLAS else ""
                    gr.Markdown(WORDS.format(methods=listed, more=more))
                with gr.Accordion("As JSON", open=False):
                    facts = gr.JSON(show_label=False)
        inputs, outputs = [image, text, factor, strength, gate], [answer, before_after, active, facts]
        # Programs have the checkpoint's method, and give what they always gave.
        gr.Button(visible=False).click(page.answer, inputs, outputs, api_name="steer")
        # One listener for them all, so that what is shown last is what was set last, by mouse, keys or typing.
        gr.on(
            [
                blocks.load,
                button.click,
                image.change,
                text.submit,
                text.blur,
                *(one.change for one in (factor, strength, gate, method)),
                off.input,
            ],
            page.show,
            [*inputs, method, off],
            [*outputs, off],
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )
    return blocks


if __name__ == "__main__":
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to be fetched
    theme = gr.themes.Default(primary_hue="blue", **fonts).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        body_text_color_subdued="*neutral_600",
    )
    build(*make_playground()).launch(css=CSS, theme=theme, max_file_size=LARGEST_FILE, footer_links=["api", "gradio"])
