"""Classify every image of a folder with a steered CLIP, beside plain CLIP's answer.

python examples/classify_folder.py photos/ --model user/sae-clip-vit-base-patch32-cifar100 --labels bus forest tractor
"""

import argparse

from transformers.pipelines.pt_utils import KeyDataset

from hf_vs2 import load_images, zero_shot_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of images")
    parser.add_argument("--model", required=True, help="VS2 or SAE checkpoint, or a plain CLIP: Hub id or path")
    parser.add_argument("--labels", nargs="+", required=True)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    classifier = zero_shot_classifier(args.model)
    images = load_images(args.folder)
    # The labels are encoded once for all images; images are read as they are needed.
    answers = classifier(
        KeyDataset(images, "image"), args.labels, templates="ensemble", batch_size=args.batch_size, return_details=True
    )
    for image, answer in zip(images["image"], answers, strict=True):
        best, plain = answer["predictions"][0], answer["plain"][0]
        how = "steered" if answer["steered"] else "plain CLIP"
        print(f"{image['path']}: {best['label']} ({best['score']:.2f}, {how}; plain CLIP: {plain['label']})")


if __name__ == "__main__":
    main()
