"""What `fast_decode` saves in reading, and how far pixels and answers move.

    python benchmarks/fast_decode.py photos/ --clip openai/clip-vit-base-patch32 --labels labels.txt
    python benchmarks/fast_decode.py photos/ --enlarged 3000

Images are opened, resized and cropped both ways, in turn, by one thread; seconds are those of the processor. `--enlarged N` first
makes each image about N pixels long, sides in multiples of 16 as a camera's, and a JPEG of quality 90, for who has no large
photographs at hand: enlarged ones have less detail than a camera's. Prints milliseconds an image, their ratio, the largest and mean difference of a pixel in levels of 255, and with
`--clip` the share of images with the same answer and the mean cosine of the embeddings.
"""

import io
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import finish, make_parser, parse, ratio, seconds_in_turn
from PIL import Image
from transformers import CLIPImageProcessorPil

import hf_vs2
from hf_vs2.data.images import open_image
from hf_vs2.data.labels.lists import names_in
from hf_vs2.data.labels.names import read_labels
from hf_vs2.data.load import undecoded
from hf_vs2.data.pixels import Normalizer, pixels_needed, reading_fast, uint8_pixels
from hf_vs2.encoders.processing import load_image_processor
from hf_vs2.encoders.tail import plain_outputs


def stored(value: dict[str, Any]) -> bytes:
    return value["bytes"] or Path(value["path"]).read_bytes()


def enlarged(content: bytes, long_side: int) -> bytes:
    image = open_image(content)
    scale = long_side / max(image.size)
    file = io.BytesIO()
    size = (round(image.width * scale / 16) * 16, round(image.height * scale / 16) * 16)
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return file.getvalue()


def read(contents: list[bytes], processor: Any) -> torch.Tensor:
    return torch.stack(
        [
            uint8_pixels(open_image(content, at_least=pixels_needed(processor)), processor, "the image")
            for content in contents
        ]
    )


def compared(args, contents: list[bytes], processor: Any) -> dict[str, Any]:
    """Answers of the pipeline and embeddings, both ways."""
    found, embeds = [], []
    for one in (processor, reading_fast(processor)):
        classify = hf_vs2.zero_shot_classifier(args.clip, image_processor=one, device=args.device)
        answers = classify(contents, names_in(read_labels([args.labels])), top_k=1)
        found.append([answer[0]["label"] for answer in answers])
        with torch.inference_mode():
            pixels = Normalizer(one, classify.device)(read(contents, one))
            embeds.append(plain_outputs(classify.model, pixels).pooler_output)
    same = sum(a == b for a, b in zip(*found, strict=True)) / len(contents)
    return {
        "same_answers": round(same, 4),
        "mean_cosine": round(float(torch.cosine_similarity(*embeds).mean()), 5),
    }


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("images", help="Folder or data set.")
    parser.add_argument("--split")
    parser.add_argument("--num_images", type=int, default=120)
    parser.add_argument("--enlarged", type=int, metavar="N")
    parser.add_argument("--clip", help="Whose answers and image processor; without it OpenAI's processor.")
    parser.add_argument("--labels", help="File of labels, for --clip.")
    args = parse(parser)
    dataset = hf_vs2.load_images(args.images, split=args.split)
    dataset = dataset.shuffle(seed=0).select(range(min(args.num_images, len(dataset))))
    contents = [stored(value) for value in undecoded(dataset, "image")["image"]]
    if args.enlarged:
        contents = [enlarged(content, args.enlarged) for content in contents]
    processor = load_image_processor(args.clip, {}) if args.clip else CLIPImageProcessorPil()
    fast = reading_fast(processor)
    sides = {"as it is": lambda: read(contents, processor), "fast": lambda: read(contents, fast)}
    seconds = seconds_in_turn(sides, args.rounds, clock=time.process_time)
    difference = (read(contents, processor).float() - read(contents, fast).float()).abs()
    row = {
        "num_images": len(contents),
        "ms_an_image": {
            name: round(1000 * statistics.median(took) / len(contents), 2) for name, took in seconds.items()
        },
        "as_it_is_over_fast": ratio(seconds["as it is"], seconds["fast"]),
        "largest_difference": int(difference.max()),
        "mean_difference": round(float(difference.mean()), 4),
        "share_of_other_values": round(float((difference > 0).float().mean()), 5),
        **(compared(args, contents, processor) if args.clip else {}),
    }
    for name, value in row.items():
        print(f"{name.replace('_', ' ')}: {value}")
    finish(args, __doc__, [row])


if __name__ == "__main__":
    main()
