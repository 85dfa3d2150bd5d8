"""What checking the digests costs: loads of files that have them, over loads of the same files as earlier versions saved them.

    python benchmarks/digests.py
    python benchmarks/digests.py --num_rows 100000 --rounds 25

Files of the true sizes with random numbers, warm in the system's cache: from a disk or the Hub the bytes take longer and the digests do not.
Without digests, weights and rows are looked through for NaN and numbers that no weight is, which digests make needless; for a store that
earlier versions did at each read, and it is done here. A store is opened anew each time, so that every shard is checked; later reads of
it check nothing. Times are of the processor, all threads together: a machine that does other work stretches the others beyond use.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from common import clip_model, finish, make_parser, parse, ratio, seconds_in_turn
from million_rows import write_store
from transformers.utils import logging

from hf_vs2 import RetrievalCorpus, SAEConfig, SAEModel, VS2CLIPForZeroShot
from hf_vs2.data.stores import store_format
from hf_vs2.data.stores.activations import ActivationStore


HIDDEN_SIZE = 768


def make_sae(num_latents):
    return SAEModel(SAEConfig(hidden_size=HIDDEN_SIZE, num_latents=num_latents, top_k=64))


def without_digests(folder):
    """As an earlier version saved it."""
    for path in (*folder.glob("config.json"), *folder.glob("corpus.json")):
        content = {name: value for name, value in json.loads(path.read_text()).items() if "digest" not in name}
        path.write_text(json.dumps(content))


def write_bare_store(folder, num_rows):
    write = store_format.write_tensors
    with patch.object(store_format, "write_tensors", lambda path, tensors, about: write(path, tensors, {})):
        write_store(folder, num_rows, HIDDEN_SIZE)


def read_store(folder):
    store = ActivationStore.open(folder)
    for rows in store.iter_batches(1024):
        if folder.name.endswith("-bare"):
            rows.aminmax()


def pairs(folder, args):
    """What is loaded -> how, from a folder with digests and from one without."""

    def saved(name, model, **options):
        for place in (folder / name, folder / f"{name}-bare"):
            model.save_pretrained(place, **options)
        without_digests(folder / f"{name}-bare")
        return folder / name, folder / f"{name}-bare"

    for num_latents in (3072, 49152):
        yield (
            f"SAE of {num_latents:,} latents",
            SAEModel.from_pretrained,
            saved(f"sae-{num_latents}", make_sae(num_latents)),
        )
    model = VS2CLIPForZeroShot(clip_model("ViT-B/32"), make_sae(3072))
    yield "full VS2 checkpoint, ViT-B/32", VS2CLIPForZeroShot.from_pretrained, saved("full", model, full=True)
    corpus = RetrievalCorpus(torch.randn(args.num_rows, HIDDEN_SIZE))
    yield f"corpus of {args.num_rows:,} rows", RetrievalCorpus.from_pretrained, saved("corpus", corpus)
    write_store(folder / "store", args.num_rows, HIDDEN_SIZE)
    write_bare_store(folder / "store-bare", args.num_rows)
    yield f"all rows of a store of {args.num_rows:,}", read_store, (folder / "store", folder / "store-bare")


def measure(name, load, folders, args):
    logging.disable_progress_bar()
    size = sum(path.stat().st_size for path in folders[0].rglob("*.safetensors"))
    sides = {"with": lambda: load(folders[0]), "without": lambda: load(folders[1])}
    seconds = seconds_in_turn(sides, args.rounds, clock=time.process_time)
    row = {"what": name, "mb": round(size / 1e6)}
    row |= {f"{side}_ms": round(1000 * statistics.median(times), 1) for side, times in seconds.items()}
    return row | {"with_over_without": ratio(seconds["with"], seconds["without"])}


def main():
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--num_rows", type=int, default=20_000, help="Of the corpus and the store.")
    args = parse(parser)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, load, folders in pairs(Path(scratch), args):
            rows.append(measure(name, load, folders, args))
            found = rows[-1]["with_over_without"]
            print(
                f"{name}, {rows[-1]['mb']} MB: {rows[-1]['with_ms']} ms with digests, {rows[-1]['without_ms']} without, "
                f"ratio {found['median']} ({found['low']} to {found['high']})",
                flush=True,
            )
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
