"""The explanation as HTML that is legible in light and dark; every word that a person gave is escaped."""

import base64
import io
from html import escape

from PIL import Image
from playground import Playground

from hf_vs2 import VS2Explanation


SHOWN_LABELS = 10

CSS = """
#picture img { width: 100%; object-fit: contain; }
.vs2 { font-size: 15px; line-height: 1.4; }
.vs2 .legend { display: flex; gap: 18px; margin: 2px 0 10px; color: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.vs2 .key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.vs2 .plain { background: #8c8c94; } .vs2 .steered { background: #2a78c5; } .vs2 .down { background: #d5661c; }
.vs2 .row { display: grid; grid-template-columns: minmax(72px, 24%) 1fr 62px; gap: 4px 10px; align-items: center; margin: 7px 0; }
.vs2 .label { overflow-wrap: anywhere; } .vs2 .best .label { font-weight: 650; }
.vs2 .track { background: var(--background-fill-secondary); border-radius: 4px; height: 11px; margin: 2px 0; }
.vs2 .bar { height: 11px; border-radius: 4px; min-width: 1px; }
.vs2 .number { text-align: right; font-variant-numeric: tabular-nums; font-size: 13px; line-height: 15px; }
.vs2 .number.plainly { color: color-mix(in srgb, var(--body-text-color) 72%, transparent); background: none; }
.vs2 .latent { border-top: 1px solid var(--border-color-primary); padding: 10px 0; display: grid; grid-template-columns: 84px 1fr; gap: 4px 14px; }
.vs2 .latent:first-child { border-top: 0; }
.vs2 .latent b { font-variant-numeric: tabular-nums; }
.vs2 .value { color: color-mix(in srgb, var(--body-text-color) 72%, transparent); font-size: 13px; }
.vs2 .pictures { display: flex; gap: 6px; flex-wrap: wrap; } .vs2 .pictures img { width: 56px; height: 56px; object-fit: cover; border-radius: 5px; }
.vs2 .verdict { font-size: 17px; padding: 10px 14px; border-radius: 8px; background: var(--background-fill-secondary); border-left: 4px solid #2a78c5; }
.vs2 .verdict.alone { border-left-color: #8c8c94; } .vs2 .verdict.problem { border-left-color: #c43d1e; }
.vs2 h2 { font-size: 17px; margin: 12px 0 4px; }
"""

HINT = "Give an image, and this shows what is made of it."

WORDS = """
**What is what?** CLIP compares the image with each label's text. A sparse autoencoder (SAE) takes what CLIP saw apart
into **latents**, few of which are active on an image. VS2 multiplies the active ones by **gamma** and adds **lambda**
of the change; switched off, one has the value 0. Other methods leave the image alone and move the labels towards unlabelled images. **FVU** says how
badly the SAE reconstructs the image: 0 is perfect, 1 is no better than the mean image. A latent's **name** is the word
that its direction moves images towards; it is unnamed where the nearest word is no nearer than by chance. The **gate** leaves an image
to plain CLIP, bit for bit, where it is unlike the images that the checkpoint was made with: where its FVU is above a
threshold, **tau**, or, for methods without an SAE, its distance to them. A steered answer is not always the better
one.

The methods:

{methods}

[The paper](https://arxiv.org/abs/2506.01247){more}
"""


def note(text: str, kind: str = "alone") -> str:
    """A sentence in the place of the answer; a screen reader says it when it comes."""
    return f'<div class="vs2"><div class="verdict {kind}" role="status">{escape(text)}</div></div>'


def likeliest(explanation: VS2Explanation) -> int:
    """The label that is answered."""
    return int(explanation.steered_scores[0].argmax())


def verdict(
    explanation: VS2Explanation, threshold: float | None = None, num_off: int = 0, method_acts: bool = True
) -> str:
    """One sentence: what plain CLIP says, what the method says, and whether the gate let it through."""
    before, after = (
        escape(explanation.labels[int(scores[0].argmax())])
        for scores in (explanation.plain_scores, explanation.steered_scores)
    )
    fvu = f"FVU {float(explanation.fvu[0]):.2f}"
    if not bool(explanation.steered[0]):
        why = "it is far from the images that the checkpoint was made with"
        if threshold is not None:
            why = f"{fvu} is above {threshold:.2f}, the SAE does not know this image well"
        text = f"<b>{before}</b>, as plain CLIP says: the gate is shut ({why})."
        if not method_acts:
            text = f"<b>{before}</b>: plain CLIP, which is this checkpoint's method."
        return f'<div class="vs2"><div class="verdict alone" role="status">{text}</div></div>'
    text = (
        f"<b>{after}</b>, as plain CLIP." if before == after else f"<b>{after}</b>; plain CLIP says <b>{before}</b>."
    )
    if threshold is not None:
        fvu += f", at most {threshold:.2f} passes the gate"
    if num_off:
        fvu += f". {num_off} latent{'s' if num_off > 1 else ''} switched off"
    return f'<div class="vs2"><div class="verdict" role="status">{text} <span class="value">Steered. {fvu}.</span></div></div>'


def bars(explanation: VS2Explanation) -> str:
    """Probabilities before and after, the likeliest labels first."""
    before, after = (part[0] for part in explanation.probabilities())
    order = before.maximum(after).argsort(descending=True).tolist()
    best = likeliest(explanation)
    rows = [
        f'<div class="row{" best" if place == best else ""}" data-label="{escape(explanation.labels[place])}">'
        f'<div class="label">{escape(explanation.labels[place])}</div><div>'
        f'<div class="track"><div class="bar plain" style="width:{100 * before[place]:.1f}%"></div></div>'
        f'<div class="track"><div class="bar steered" style="width:{100 * after[place]:.1f}%"></div></div></div>'
        f'<div><div class="number plainly">{percent(before[place])}</div><div class="number">{percent(after[place])}</div></div></div>'
        for place in order[:SHOWN_LABELS]
    ]
    rest = f'<div class="value">{len(order) - SHOWN_LABELS} more labels</div>' if len(order) > SHOWN_LABELS else ""
    legend = (
        '<span><span class="key plain"></span>plain CLIP</span><span><span class="key steered"></span>steered</span>'
    )
    return f'<div class="vs2"><div class="legend">{legend}</div>{"".join(rows)}{rest}</div>'


def latents(explanation: VS2Explanation, number: int, playground: Playground, atlas: str = "") -> str:
    """The latents that moved the top label most, each with its name, the images that activate it and a link to an
    atlas."""
    best = likeliest(explanation)
    found = explanation.top(best, number)
    if not found:
        if not bool(explanation.steered[0]):
            return note("The gate is shut: both answers are plain CLIP's, and no latent moved anything.")
        if explanation.replacement.any():
            return note("This method changes the scores themselves and moves no latent.")
        return note("No latent moved anything.")
    label, blocks = escape(explanation.labels[best]), []
    for latent in found:
        pictures = "".join(
            f'<img src="{data_uri(image)}" alt="">' for image in playground.strongest_images(latent["latent"])
        )
        sign = "steered" if latent["contribution"] >= 0 else "down"
        link = f"<b>#{latent['latent']}</b>"
        if atlas:
            address = escape(f"{atlas.rstrip('/')}/index.html#latent={latent['latent']}")
            link = f'<a href="{address}" target="_blank" rel="noopener">{link}</a>'
        blocks.append(
            f'<div class="latent"><div>{link}<div class="value">value {latent["value"]:.2f}</div></div>'
            f'<div><div class="name">{escape(playground.name(latent["latent"]))}</div>'
            f'<span class="key {sign}"></span>{latent["contribution"]:+.2f} to the score of {label}'
            f'<div class="pictures">{pictures}</div></div></div>'
        )
    title = f"<h2>Latents that moved <i>{label}</i>, and the images that activate them</h2>"
    return f'<div class="vs2">{title}{"".join(blocks)}</div>'


def percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
