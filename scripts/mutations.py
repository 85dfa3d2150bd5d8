"""Break the code in 60 places that users would meet, and count how many of them the tests catch.

    python scripts/mutations.py                    # all of them: about an hour on one core
    python scripts/mutations.py --only 7 --only 12
    python scripts/mutations.py --out before.json  # and continue there when it is called again

Each mutation replaces one text of a file in src/hf_vs2 by another, in a copy of the tree, and runs the tests that should
notice (the fast ones, up to the first that fails; torch is imported once, the rest in a fork of that process). A text that
is no longer in its file, or is there twice, makes the mutation stale: it counts neither as caught nor as missed, and is to
be written anew. The faults were chosen by what a user would lose, before anybody looked at which tests catch them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """`tests` are run in this order; those that do not exist are left out."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(tests: str, file: str, what: str, old: str, new: str) -> Mutation:
    return Mutation(what, file, old, new, tuple(f"tests/{test}" for test in tests.split()))


MUTATIONS = (
    # functional
    of(
        "functional sae",
        "functional/equations.py",
        "negative latents are lost with activation='absolute'",
        "pre_activations.abs().topk(k, dim=-1, sorted=False)",
        "pre_activations.topk(k, dim=-1, sorted=False)",
    ),
    of(
        "functional methods",
        "functional/equations.py",
        "a row that is moved to 0 becomes NaN",
        "return moved * torch.where(moved_norm > 0, scale, torch.zeros_like(scale))",
        "return moved * scale",
    ),
    of(
        "functional steering",
        "functional/equations.py",
        "the gate holds back the row that lies on its threshold",
        "return fvu <= threshold",
        "return fvu < threshold",
    ),
    of(
        "functional methods steering clip",
        "functional/equations.py",
        "VS2++ moves towards the negatives too",
        "torch.where(positive, size, size - positive.shape[-1])",
        "torch.where(positive, size, positive.shape[-1] - size)",
    ),
    of(
        "config methods clip",
        "functional/equations.py",
        "a suppressed latent keeps what the method adds to it",
        "kept = torch.where((changed.unsqueeze(-1) == latents).any(-1), 0, change)",
        "kept = change",
    ),
    of(
        "functional methods steering",
        "functional/label_free.py",
        "rare latents count no more than common ones in the SAE's view",
        "return normalize((dense - latent_mean) * -latent_frequency.log(), dim=-1)",
        "return normalize(dense - latent_mean, dim=-1)",
    ),
    of(
        "functional/test_neighbors.py functional steering",
        "functional/neighbors.py",
        "VS2++ takes the rarest label of the neighbours for the majority's",
        "counts.argmax(-1, keepdim=True)",
        "counts.argmin(-1, keepdim=True)",
    ),
    # methods
    of(
        "methods clip",
        "methods/vs2.py",
        "lambda is ignored",
        "change = batch.lambda_ * (amplify",
        "change = (amplify",
    ),
    of(
        "methods steering",
        "methods/corrected.py",
        "the latents' means are subtracted twice",
        "- alpha / 2 * offset",
        "- alpha * offset",
    ),
    of(
        "methods steering",
        "methods/distribution_norm.py",
        "the coefficient of distribution norm is ignored",
        "found = norm_fit(classes, rows.mean(), rows.coefficient)",
        "found = norm_fit(classes, rows.mean())",
    ),
    # config
    of(
        "config clip",
        "config/steering.py",
        "a new gate is refused as long as a threshold was set",
        "settings.setdefault(other, None)",
        "pass",
    ),
    of(
        "config clip steering methods",
        "config/vs2_clip.py",
        "edits of latents are not saved",
        '"edits": edits and edits.to_dict()',
        '"edits": None',
    ),
    of(
        "config steering clip",
        "config/vs2_clip.py",
        "a checkpoint of before `coefficient` gives other scores",
        'config_dict = config_dict | {"method": BEFORE[method]}',
        "pass",
    ),
    of(
        "config clip",
        "config/sae.py",
        "a gate between two stored levels takes the higher one",
        "return low_value + (high_value - low_value) * (quantile - low) / (high - low)",
        "return high_value",
    ),
    # files
    of(
        "files survival",
        "files/atomic.py",
        "a file that declares the others is written first",
        "key=lambda name: name == last)",
        "key=lambda name: name != last)",
    ),
    of(
        "survival files",
        "files/atomic.py",
        "a save through a link replaces the link",
        'leads to."""\n    folder = folder.resolve()',
        'leads to."""',
    ),
    of(
        "survival files",
        "files/weight_files.py",
        "weights of another save are loaded in silence",
        "        check_digest(path, digests)\n",
        "",
    ),
    of(
        "survival files sae",
        "files/weight_files.py",
        "weights with NaN are loaded",
        "if not (lowest >= -LARGEST and highest <= LARGEST):",
        "if lowest < -LARGEST or highest > LARGEST:",
    ),
    of(
        "files/test_foreign.py files",
        "files/foreign/sparsify.py",
        "k of a sparsify checkpoint is not read",
        'top_k=setting("k", int, 32),',
        "top_k=32,",
    ),
    of(
        "files/test_model_card.py files/test_hub.py files",
        "files/sharing/card_edits.py",
        "a text edited on the Hub is overwritten",
        "edited_there = not there.author or there.text_changed",
        "edited_there = False",
    ),
    of(
        "files/test_hub.py files",
        "files/sharing/hub_push.py",
        "files that the checkpoint no longer has stay on the Hub",
        "return content, sorted(stale - content.keys())",
        "return content, []",
    ),
    # encoders
    of(
        "encoders clip steering",
        "encoders/tail.py",
        "SigLIP's answers are a softmax",
        "return logits.sigmoid() if is_sigmoid(clip) else logits.softmax(-1)",
        "return logits.softmax(-1)",
    ),
    of(
        "encoders/test_fingerprints.py encoders clip",
        "encoders/fingerprints.py",
        "an SAE is accepted with a CLIP of other weights",
        "if math.isfinite(then) and abs(now - then) > _TOLERANCE * sample.size + 1e-6:",
        "if math.isfinite(then) and abs(now - then) > 1e6:",
    ),
    of(
        "encoders data",
        "encoders/vision_tower.py",
        "rows are taken from the layer before",
        "            if number in layers:\n                rows[number] = hidden[:, 0]\n",
        "            if number + 1 in layers:\n                rows[number + 1] = hidden[:, 0]\n",
    ),
    # sae
    of(
        "sae steering",
        "sae/modeling.py",
        "half precision rounds the training mean, so the gate moves",
        "            self.mean = mean.to(self.mean.device)\n",
        "            self.mean = self.mean.float()\n",
    ),
    of(
        "sae training",
        "sae/modeling.py",
        "a dead decoder row becomes NaN",
        "weight.div_(torch.where(norms > 0, norms, 1).to(weight.dtype))",
        "weight.div_(norms.to(weight.dtype))",
    ),
    of(
        "sae steering",
        "sae/statistics.py",
        "a gate above what the held-out rows can vouch for is refused",
        "return quantile_of(self.distance_quantiles, min(quantile, highest), ",
        "return quantile_of(self.distance_quantiles, quantile, ",
    ),
    # data
    of(
        "data/test_images.py test_every_door.py data",
        "data/images.py",
        "photos of phones lie on the wrong side",
        "6: Image.Transpose.ROTATE_270,",
        "6: Image.Transpose.ROTATE_90,",
    ),
    of(
        "test_every_door.py data/test_images.py data",
        "data/images.py",
        "transparent pixels become black",
        "(255, 255, 255, 255)",
        "(0, 0, 0, 255)",
    ),
    of(
        "test_every_door.py data/test_images.py data",
        "data/images.py",
        "16-bit images are nearly black",
        "* 255 + 32767) // 65535)",
        "* 255 + 32767) // (65535 * 16))",
    ),
    of(
        "data/test_names.py test_every_door.py data cli",
        "data/labels/names.py",
        "underscores stay in prompts",
        '.replace("_", " ").split())',
        ".split())",
    ),
    of(
        "data/test_names.py data/test_folders.py data",
        "data/labels/names.py",
        "class 10 comes before class 9",
        "return sorted(different, key=lambda name: (float(name), name))",
        "return different",
    ),
    of(
        "data/test_folders.py test_every_door.py data cli",
        "data/folders/listing.py",
        "hidden files of the system are read as images",
        'if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_NAMES:',
        "if entry.name.lower() in _SYSTEM_NAMES:",
    ),
    of(
        "data/test_folders.py data",
        "data/folders/local.py",
        'a class called "None" or "NA" is lost',
        '"keep_default_na": False, ',
        "",
    ),
    of(
        "data/test_store.py data survival",
        "data/stores/store.py",
        "a flipped bit in stored activations is not noticed",
        'if "digests" in header and header["digests"].get(name) != tensor_digest(shard.get_tensor(name)):',
        "if False:",
    ),
    of(
        "data/test_activations.py data",
        "data/stores/fingerprint.py",
        "labels that were changed give the old store",
        "digest.update(labels.astype(np.int64).tobytes())",
        "pass",
    ),
    of(
        "data/test_prompts.py data clip",
        "data/labels/prompts.py",
        "of an ensemble only the first template counts",
        "encoded[rows.to(encoded.device)].mean(1)",
        "encoded[rows.to(encoded.device)][:, 0]",
    ),
    # steering
    of(
        "steering clip methods",
        "steering/steerer.py",
        "the gate is reported, and rows are moved all the same",
        "moved = torch.where(steered.to(rows.device).unsqueeze(-1), moved, rows)",
        "pass",
    ),
    of(
        "steering clip methods",
        "steering/steerer.py",
        "rows that the gate holds back are scored by the prototypes",
        "scores = torch.where(steered, self.settings.rule.score(embeds, class_embeds, fit, views), scores)",
        "scores = self.settings.rule.score(embeds, class_embeds, fit, views)",
    ),
    of(
        "steering",
        "steering/label_sets.py",
        "prototypes of other settings are used again",
        "step = () if rule.step is None else (float(chosen.lambda_), *map(float, chosen.gamma_factors))",
        "step = ()",
    ),
    of(
        "steering",
        "steering/label_sets.py",
        "prototypes of other weights are used again",
        "self._recent.get(state, asked, ",
        "self._recent.get((), asked, ",
    ),
    of(
        "steering/test_corpus.py steering",
        "steering/corpus_search.py",
        "latents of a corpus are those of the SAE before it was trained on",
        "self._indexed.get(state, None, ",
        "self._indexed.get((), None, ",
    ),
    # clip
    of(
        "clip files steering",
        "clip/loading.py",
        "a light checkpoint loses a fine-tuned CLIP",
        "    if not others:\n        return False\n    differs",
        "    return False\n    differs",
    ),
    of(
        "clip/test_modeling_vs2_clip.py clip methods",
        "clip/modeling.py",
        "steering by the model's forward forgets the gate for label sets",
        "logits_per_text = torch.where(made.steered.to(scored.device), scored, logits_per_text)",
        "logits_per_text = scored",
    ),
    of(
        "clip/test_pipeline.py clip",
        "clip/pipeline.py",
        "the pipeline answers with embeddings of other templates",
        "(labels, templates, clean, repr(",
        "(labels, clean, repr(",
    ),
    of(
        "clip/test_pipeline.py clip",
        "clip/pipeline.py",
        "settings of one call stay for the next",
        "call.steerer = self.core.steerer.with_(**steering or {})",
        "self.core.set_steering(**steering or {})\n                call.steerer = self.core.steerer",
    ),
    # training
    of(
        "training",
        "training/step.py",
        "the decoder's directions are not kept at unit length",
        "        self.sae.normalize_decoder()\n",
        "",
    ),
    of(
        "training",
        "training/calibration.py",
        "thresholds pass too few fresh rows",
        "math.ceil((len(ordered) + 1) * level - 1e-9)",
        "math.ceil(len(ordered) * level - 1e-9)",
    ),
    of(
        "training survival/test_survives_resume.py",
        "training/progress.py",
        "a resumed training forgets which latents are dead",
        "self.steps_since_active = counters.to(accelerator.device)",
        "pass",
    ),
    # evaluation and explain
    of(
        "evaluation",
        "evaluation/metrics.py",
        "gains have the wrong sign in their interval",
        "gains = 100 * (draws[:, 2] - draws[:, 0]) / n",
        "gains = 100 * (draws[:, 0] - draws[:, 2]) / n",
    ),
    of(
        "evaluation study",
        "evaluation/metrics.py",
        "a class without images counts as 0 %",
        "return [100 * hit / n if n else None for",
        "return [100 * hit / n if n else 0.0 for",
    ),
    of(
        "explain",
        "explain/explanation.py",
        "the latents that are not listed are lost from the sum",
        '"others": contributions[rest].sum().item(),',
        '"others": 0.0,',
    ),
    of(
        "explain",
        "explain/latent_names.py",
        "latents without a meaning get a name",
        "for word, score in self.of(latent)[:1] if score >= self.floor), None",
        "for word, score in self.of(latent)[:1]), None",
    ),
    # jobs
    of(
        "atlas evaluation",
        "evaluation/metrics.py",
        "one class fills the list of fixed images",
        "if seen[group(row)] <= per_group and len(chosen) < most:",
        "if len(chosen) < most:",
    ),
    of(
        "adaptation",
        "adaptation/checked.py",
        "labels that somebody filled in are overwritten",
        "if path.is_file() and read_checked(path):",
        "if False:",
    ),
    of(
        "study survival/test_every_artefact.py",
        "study/results/cells.py",
        "outcomes of a study that were damaged are used",
        'if content.get("outputs_digest") not in (None, file_digest(path)):',
        "if False:",
    ),
    of(
        "demo",
        "demo/folds.py",
        "outcomes of the folds are in the wrong order",
        "order = torch.cat(list(folds)).argsort()",
        "order = torch.cat(list(folds))",
    ),
    # cli
    of(
        "cli",
        "cli/parsing.py",
        "the file of --config wins over the command line",
        "argv = [*self._from_config(argv), *argv]",
        "argv = [*argv, *self._from_config(argv)]",
    ),
    of(
        "cli/test_cli.py cli",
        "cli/answers.py",
        "images that have an answer are answered again",
        "return [name for name in dict.fromkeys(names) if name not in answered]",
        "return list(dict.fromkeys(names))",
    ),
    of(
        "cli survival",
        "cli/faults.py",
        "a full disk ends in a traceback",
        'return "shared memory" if re.search(_TEXTS["shared memory"], text) else "full"',
        "return None",
    ),
)


def import_slow_libraries() -> None:
    """None that reads the environment when it is imported, as huggingface_hub does (see tests/conftest.py)."""
    for name in (
        "torch",
        "torch.utils.data",
        "numpy",
        "pandas",
        "pyarrow",
        "PIL.Image",
        "safetensors.torch",
        "sklearn",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def copy_tree(to: Path) -> None:
    """What git knows of, and new files."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def run(mutation: Mutation, tree: Path) -> dict[str, object]:
    """`caught` by the first test that failed, `missed`, `stale`, or `red`: that test fails on the code as it is, too."""
    path = tree / "src" / "hf_vs2" / mutation.file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    if source.count(mutation.old) != 1:
        return {"state": "stale"}
    before = time.time()
    write(path, source.replace(mutation.old, mutation.new))
    said = in_a_fork(tree, mutation.tests)
    write(path, source)
    state = "missed"
    if said:
        is_test = said.startswith("tests/")
        state = "red" if is_test and in_a_fork(tree, (said,)) else "caught"
    return {"state": state, "by": " ".join(said.split())[:200], "seconds": round(time.time() - before, 1)}


def in_a_fork(tree: Path, tests: tuple[str, ...]) -> str:
    """[`first_failure`] in a process of its own, which has not imported hf_vs2 yet."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            said = first_failure(tree, tests)
        except BaseException as error:  # a module that does not even import is noticed
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def first_failure(tree: Path, tests: tuple[str, ...]) -> str:
    """The first test that fails; empty if none does."""
    import pytest

    class Failures:
        names: list[str] = []

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                self.names.append(report.nodeid)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                self.names.append(report.nodeid)

    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.path.insert(0, str(tree / "src"))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    # In one session: conftest.py starts a Hub, whose address huggingface_hub reads once a process.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--rootdir", str(tree)]
    pytest.main(
        [*options, *(str(tree / test) for test in tests if (tree / test.partition("::")[0]).exists())],
        plugins=[Failures()],
    )
    return Failures.names[0] if Failures.names else ""


def write(path: Path, source: str) -> None:
    """With a date that no compiled file has."""
    path.write_text(source, encoding="utf-8")
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, action="append", help="Number of a mutation, from 1; may be repeated.")
    parser.add_argument("--out", type=Path, help="JSON of the results; what it holds is not run again.")
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    import_slow_libraries()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for number, mutation in enumerate(MUTATIONS, 1):
            if args.only and number not in args.only:
                continue
            if args.only or known.get(mutation.what, {}).get("state") not in ("caught", "missed"):
                known[mutation.what] = run(mutation, tree)
                if args.out:
                    args.out.write_text(json.dumps(known, indent=1))
            found = known[mutation.what]
            print(f"{number:2} {found['state']:6} {mutation.file}: {mutation.what} {found.get('by', '')}", flush=True)
    own = [known[mutation.what]["state"] for mutation in MUTATIONS if mutation.what in known]
    counts = ", ".join(f"{own.count(state)} {state}" for state in ("caught", "missed", "stale", "red"))
    print(f"{counts}, of {len(own)}.")


if __name__ == "__main__":
    main()
