"""What a short command costs before it works: `hf-vs2 classify` of one image beside transformers' own pipeline.

    python benchmarks/start_up.py CHECKPOINT CLIP IMAGE

CLIP is the checkpoint's. Seconds of the processor, each side in fresh processes, in turn: a machine that does other work
stretches other times beyond use. For reference what importing torch and CLIPModel alone take.
"""

import os
import resource
import statistics
import subprocess
import sys
from functools import partial

from common import finish, make_parser, parse, ratio, seconds_in_turn


STOCK = """
import sys
from transformers import pipeline
print(pipeline("zero-shot-image-classification", model=sys.argv[1])(sys.argv[2], candidate_labels=["cat", "dog"]))
"""


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    for name in ("checkpoint", "clip", "image"):
        parser.add_argument(name)
    args = parse(parser)
    commands = {
        "import torch": ["-c", "import torch"],
        "import CLIPModel": ["-c", "from transformers import CLIPModel"],
        "transformers' pipeline": ["-c", STOCK, args.clip, args.image],
        "hf-vs2 classify": ["-m", "hf_vs2.cli", "classify", args.image, "--checkpoint", args.checkpoint]
        + ["--labels", "cat", "dog", "--clip", args.clip],
    }
    run = partial(
        subprocess.run, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}, check=True, stdout=subprocess.DEVNULL
    )
    sides = {name: partial(run, [sys.executable, *command]) for name, command in commands.items()}
    seconds = seconds_in_turn(sides, args.rounds, clock=seconds_of_children)
    _, _, theirs, ours = seconds.values()
    rows = [{"side": name, "seconds": round(statistics.median(taken), 2)} for name, taken in seconds.items()]
    rows.append({"side": "classify over pipeline", **ratio(ours, theirs)})
    for row in rows:
        print(row)
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
