"""Train a sparse autoencoder on unlabelled images, and share it on the Hub with its model card.

python examples/train_and_push.py --model openai/clip-vit-base-patch32 --dataset uoft-cs/cifar100 --split train \
    --image_column img --output_dir outputs/sae-cifar100 --repo_id user/sae-clip-vit-base-patch32-cifar100
"""

import argparse

from hf_vs2 import SAEConfig, SAETrainer, SAETrainingArguments, extract_activations, load_images, push_to_hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="CLIP model: Hub id or path")
    parser.add_argument("--dataset", required=True, help="data set: Hub id, folder of images, folder of parquet files")
    parser.add_argument("--split", help="such as train or train[:600]")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--repo_id", required=True, help="where to put it on the Hub: user/name")
    parser.add_argument("--license", help="your licence for it, such as apache-2.0")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()

    # Extract the activations, once: what is found in the folder is not computed again.
    images = load_images(args.dataset, args.split, image_column=args.image_column)
    rows = extract_activations(
        args.model, images, f"{args.output_dir}/activations", image_column=args.image_column, dataset_id=args.dataset
    )

    # Train, calibrate the gate on rows held out from training, and save.
    trainer = SAETrainer(
        SAEConfig(hidden_size=rows.hidden_size, top_k=args.top_k),
        SAETrainingArguments(output_dir=args.output_dir, max_steps=args.max_steps),
        rows,
    )
    print(trainer.train())

    # Share it: one commit, and none if nothing has changed.
    commit = push_to_hub(args.output_dir, args.repo_id, private=args.private or None, license=args.license)
    print(commit.commit_url)


if __name__ == "__main__":
    main()
