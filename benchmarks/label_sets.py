"""Seconds to embed large label sets: prompts in batches of equal length, as the pipeline does it, and as they are given.

    python benchmarks/label_sets.py CLIP
    python benchmarks/label_sets.py CLIP --size ViT-B/32 --num_labels 1000    # its tokenizer, random weights of that size

The names are words of the vocabulary of `hf-vs2 atlas` and pairs of them, in the order of chance, in one prompt. Prints the
seconds of the processor and the largest difference of the embeddings.
"""

import random
import statistics
import time
from functools import partial
from importlib.resources import files

from common import SIZES, clip_model, finish, make_parser, parse, ratio, seconds_in_turn

from hf_vs2 import zero_shot_classifier
from hf_vs2.data.labels.prompts import class_embeddings


def names(number: int) -> list[str]:
    dice = random.Random(0)
    words = files("hf_vs2.explain").joinpath("words.txt").read_text(encoding="utf-8").split("\n")
    words = [word for word in words if word and not word.startswith("#")]
    pairs = (f"{dice.choice(words)} {dice.choice(words)}" for _ in range(2 * number))
    return dice.sample(list(dict.fromkeys([*words, *pairs]))[: max(number, len(words))], number)


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("clip", help="Folder or Hub id.")
    parser.add_argument("--num_labels", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--size", choices=SIZES)
    args = parse(parser)
    classifier, rows = zero_shot_classifier(args.clip, device=args.device), []
    model = clip_model(args.size, args.device) if args.size else classifier.model
    for number in args.num_labels:
        make = partial(class_embeddings, model, classifier.tokenizer, names(number), refuse_same=False)
        difference = (make() - make(by_length=True)).abs().max().item()
        sides = {"as given": make, "by length": partial(make, by_length=True)}
        seconds = seconds_in_turn(sides, args.rounds, args.device, clock=time.process_time)
        row = {"labels": number, "difference": difference}
        row |= {side: round(statistics.median(taken), 2) for side, taken in seconds.items()}
        rows.append(row | {"as given over by length": ratio(seconds["as given"], seconds["by length"])})
        print(rows[-1])
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
