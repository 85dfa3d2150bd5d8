"""How many answers are the same when CLIP runs in half precision, how far FVU moves, and the processor's seconds.

    python benchmarks/half_precision.py CHECKPOINT IMAGES --labels labels.json
    python benchmarks/half_precision.py CHECKPOINT IMAGES --split test --num_images 500

The same images go through the pipeline with CLIP in float32 and in --model_dtype; SAE and steering stay in float32. Labels are those
of the data set where --labels does not give others. Prints the share of images with the same answer, plain and steered; of those
that the gate treats alike; the mean FVU of both and the largest difference of one image; and the ratio of seconds.
"""

import json
import time
from pathlib import Path

import torch
from common import finish, make_parser, parse

import hf_vs2


def answers(args, images, labels, dtype):
    """The seconds, and of each image: plain answer, steered answer, whether it was steered, FVU."""
    classify = hf_vs2.zero_shot_classifier(args.checkpoint, device=args.device)
    classify.clip.to(dtype)
    start = time.process_time()
    found = classify(images, labels, top_k=1, templates="single", return_details=True)
    seconds = time.process_time() - start
    return seconds, [
        (one["plain"][0]["label"], one["predictions"][0]["label"], one["steered"], one["fvu"]) for one in found
    ]


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("checkpoint")
    parser.add_argument("images", help="Folder or data set.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--labels", help="JSON list.")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--model_dtype", default="bfloat16")
    args = parse(parser)
    dataset = hf_vs2.load_images(args.images, split=args.split)
    dataset = dataset.shuffle(seed=0).select(range(min(args.num_images, len(dataset))))
    labels = json.loads(Path(args.labels).read_text()) if args.labels else dataset.features["label"].names
    images = list(dataset["image"])
    seconds, exact = answers(args, images, labels, torch.float32)
    half_seconds, half = answers(args, images, labels, getattr(torch, args.model_dtype))
    plain, steered, gate = (
        sum(a[place] == b[place] for a, b in zip(exact, half, strict=True)) / len(exact) for place in range(3)
    )
    fvu = torch.tensor([(a[3], b[3]) for a, b in zip(exact, half, strict=True)])
    row = {
        "num_images": len(images),
        "num_labels": len(labels),
        "same_plain_answer": round(plain, 4),
        "same_steered_answer": round(steered, 4),
        "same_side_of_the_gate": round(gate, 4),
        "mean_fvu": [round(value, 4) for value in fvu.mean(0).tolist()],
        "largest_difference_of_fvu": round(float((fvu[:, 0] - fvu[:, 1]).abs().max()), 4),
        "processor_seconds": [round(seconds, 1), round(half_seconds, 1)],
    }
    for name, value in row.items():
        print(f"{name.replace('_', ' ')}: {value}")
    finish(args, __doc__, [row])


if __name__ == "__main__":
    main()
