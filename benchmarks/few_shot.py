"""When a few labelled images beat what needs none: a linear probe, Tip-Adapter and nearest class mean with 1 to 16 images a class,
beside the methods without labels, on cached rows.

    python benchmarks/few_shot.py CLIP TRAIN_ROWS TEST_ROWS

CLIP is a folder or Hub id; the rows are safetensors files with `cls` (n, hidden_size) and `label` (n,), and a JSON list of
class names in their metadata (`names`). TRAIN_ROWS are used without labels, to fit the methods to.
"""

import argparse
import json

import torch
from safetensors import safe_open

import hf_vs2


METHODS = ["anchored_prototypes", "prototypes"]
SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5


def read(path: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Rows, labels and class names of a file."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        names = json.loads(about["names"])
        return file.get_tensor("cls").float(), file.get_tensor("label").long(), names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip")
    parser.add_argument("train_rows")
    parser.add_argument("test_rows")
    args = parser.parse_args()
    train, _, _ = read(args.train_rows)
    test, labels, names = read(args.test_rows)
    plain = hf_vs2.zero_shot_classifier(args.clip)
    # None of these methods reads the SAE, which holds the statistics of the unlabelled rows.
    sae = hf_vs2.SAEModel(hf_vs2.SAEConfig(hidden_size=train.shape[1], expansion_factor=1, top_k=1))
    sae.set_statistics(train.mean(0), train.var(0).sum().item())
    sae.set_domain_statistics(hf_vs2.measure_statistics(sae, train, clip=plain.model))
    model = hf_vs2.VS2CLIPForZeroShot(plain.model, sae).eval()
    for shots in SHOTS:
        options = {"templates": "ensemble", "methods": METHODS, "few_shot": shots}
        draws = [
            hf_vs2.evaluate(model, test, labels, names, plain.tokenizer, seed=seed, **options) for seed in range(DRAWS)
        ]
        print(f"{shots} a class, n={draws[0].rows[0]['n']}, mean of {DRAWS} draws [interval of the first]")
        for place, row in enumerate(draws[0].rows):
            top1, gain = (sum(one.rows[place].get(key, 0) for one in draws) / DRAWS for key in ("top1", "gain"))
            low, high = row["gain_ci"]
            print(f"  {row['method']:<20} {top1:6.2f} {gain:+6.2f} [{low:+.2f}, {high:+.2f}]", flush=True)


if __name__ == "__main__":
    main()
