"""Import time of hf_vs2 and time to help of its command line, in fresh processes.

`import hf_vs2` against the import of the transformers classes that it registers with or derives from: as the difference of two
processes, and, where other work on the machine makes that uncertain, as what it takes in a process that has imported those classes.
`hf-vs2 --help` and each command's (started as `python -m hf_vs2.cli`), and Python alone for
reference. Aims: under 0.2 s more than transformers; help in under 1 s.

    python benchmarks/import_time.py --threads 2
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

from common import finish, make_parser, parse, ratio, seconds_in_turn

from hf_vs2.cli import COMMANDS


TRANSFORMERS = """
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline
"""

ON_TOP = f"""
import time
{TRANSFORMERS}
start = time.perf_counter()
import hf_vs2
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = make_parser(__doc__, rounds=11)
    args = parse(parser)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}

    def process(*arguments: str) -> Callable[[], subprocess.CompletedProcess[bytes]]:
        return partial(
            subprocess.run, [sys.executable, *arguments], env=environment, check=True, stdout=subprocess.PIPE
        )

    imports = {
        "import hf_vs2": process("-c", "import hf_vs2"),
        "transformers' classes": process("-c", TRANSFORMERS),
    }
    helps = {"python -c pass": process("-c", "pass"), "hf-vs2 --help": process("-m", "hf_vs2.cli", "--help")}
    helps |= {f"hf-vs2 {name} --help": process("-m", "hf_vs2.cli", name, "--help") for name in COMMANDS}

    seconds = seconds_in_turn(imports, args.rounds) | seconds_in_turn(helps, args.rounds)
    rows = [{"side": name, "seconds": round(statistics.median(taken), 3)} for name, taken in seconds.items()]
    ours, theirs = (seconds[name] for name in imports)
    more = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    on_top = statistics.median(float(process("-c", ON_TOP)().stdout) for _ in range(args.rounds))
    rows[0] |= {"seconds_more": round(more, 3), "seconds_on_top": round(on_top, 3), "ratio": ratio(ours, theirs)}
    for row in rows:
        print(f"{row['side']:<24} {row['seconds']:7.3f} s")
    print(f"import hf_vs2 against transformers' classes: {more:+.3f} s (median of the differences, round by round)")
    print(f"import hf_vs2 in a process that has imported them: {on_top:.3f} s")
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
