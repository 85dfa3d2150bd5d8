"""A Space that shows what steering does to an image of yours: `python app.py`.

Without settings it makes and shows the demo's checkpoint, offline. `VS2_CHECKPOINT` names another, a folder or a Hub id, and
`VS2_IMAGES` images (a folder, or a data set's id) to show what activates a latent; `VS2_LABELS` are the labels to begin with.
"""

import os
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr  # noqa: E402
from huggingface_hub.constants import HF_HOME  # noqa: E402
from looks import CSS, HINT, bars, latents, verdict  # noqa: E402
from PIL import Image  # noqa: E402
from playground import SHOWN_LATENTS, Playground, demo_checkpoint, read_labels  # noqa: E402

from hf_vs2 import load_images  # noqa: E402
from hf_vs2.data.inputs import NamedImages  # noqa: E402


HOUR, DAY = 3600, 86400
LARGEST_FILE = "30mb"


def make_playground() -> tuple[Playground, str, list[Image.Image]]:
    """The playground, the labels to begin with and a few images to try."""
    checkpoint, images, labels = (os.environ.get(f"VS2_{name}") for name in ("CHECKPOINT", "IMAGES", "LABELS"))
    if checkpoint is None:
        from hf_vs2.demo.data import DIGIT_NAMES, load_handwriting

        digits = load_handwriting()
        folder = Path(os.environ.get("VS2_DEMO_FOLDER", Path(HF_HOME) / "hf_vs2_space"))
        examples = [digits[place]["image"] for place in (94, 0, 15, 31, 77)]
        return Playground(demo_checkpoint(folder), digits), labels or ", ".join(DIGIT_NAMES), examples
    shown = load_images(images, split="train[:1000]") if images else None
    named = NamedImages(shown["image"] if shown else [])
    examples = [named[place].read() for place in range(min(5, len(named)))]
    return Playground(checkpoint, shown), labels or "cat, dog, bird", examples


def build(playground: Playground, labels: str, examples: list[Image.Image]) -> gr.Blocks:
    defaults = playground.defaults
    gamma = 1.5 if playground.has_own_gammas else defaults.gamma

    def steer(path, text, gamma, lambda_, gate):
        if path is None:
            raise gr.Error("Give an image first.", print_exception=False)
        try:
            found = playground.explain(Path(path).read_bytes(), read_labels(text), gamma, lambda_, gate)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        shown = latents(found, SHOWN_LATENTS, playground.strongest_images)
        return verdict(found), bars(found), shown, found.to_dict(SHOWN_LATENTS)[0]

    def follow(path, *settings):
        return (HINT, "", "", None) if path is None else steer(path, *settings)

    with gr.Blocks(title="Visual Sparse Steering", analytics_enabled=False, delete_cache=(HOUR, DAY)) as page:
        gr.Markdown(
            "# Visual Sparse Steering\nA sparse autoencoder amplifies what is active in your image. No labels were used to train it."
        )
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    type="filepath",
                    format="png",
                    label="Image",
                    height=260,
                    elem_id="picture",
                    sources=["upload", "clipboard"],
                )
                # Gradio itself would open the file here, and not tell people why it could not.
                image.preprocess = lambda file: file and file.path
                if examples:
                    gr.Examples([[example] for example in examples], [image], label="Images to try")
                text = gr.Textbox(labels, label="Labels, separated by commas", lines=2)
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
                    label="Gate: leave images alone that the SAE does not know",
                    interactive=playground.has_gate,
                )
                button = gr.Button("Steer", variant="primary")
            with gr.Column(scale=3):
                answer, before_after, active = gr.HTML(HINT), gr.HTML(), gr.HTML()
                with gr.Accordion("As JSON", open=False):
                    facts = gr.JSON(show_label=False)
        inputs, outputs = [image, text, factor, strength, gate], [answer, before_after, active, facts]
        button.click(steer, inputs, outputs, api_name="steer")
        # One listener for them all, so that what is shown last is what was set last.
        gr.on(
            [image.change, text.submit, text.blur, factor.release, strength.release, gate.input],
            follow,
            inputs,
            outputs,
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )
    return page


if __name__ == "__main__":
    page = build(*make_playground())
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to be fetched
    page.launch(css=CSS, theme=gr.themes.Default(**fonts), max_file_size=LARGEST_FILE)
