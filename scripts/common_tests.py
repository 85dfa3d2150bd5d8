"""
Runs transformers' own common tests of models, configurations and pipelines over SAEModel and VS2CLIPForZeroShot.

    python scripts/common_tests.py --cache ~/.cache/hf_vs2-common-tests [-- -k attention -x]

The tests are those of the installed release: its source distribution is fetched by pip, from whatever index pip is set up
for, and kept in the folder. Two files that the distribution lacks are replaced by small ones of our own. The cases, and what
does not apply, stand in `common_cases.py`. What follows `--` goes to pytest. Exits with 77 where the tests can't be had.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers


SKIPPED = 77
HERE = Path(__file__).resolve().parent
PACKAGE = "transformers_common"
# What the files of the distribution import from folders that it leaves out.
STAND_INS = {
    "__init__.py": "from transformers import *\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'output_attentions': True,\n"
        "    'dtype': 'float16', 'chunk_size_feed_forward': 5, 'architectures': ['CLIPModel'],\n"
        "    'id2label': {0: 'label'}, 'label2id': {'label': 0}, 'problem_type': 'regression'}\n"
    ),
    "exporters/test_export.py": '''import torch


class ExportTesterMixin:
    def test_exports_with_a_dynamic_batch(self):
        """One exported program, run with the batch it was traced with and with another one."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            images = self.model_tester.batched_inputs
            names = [name for name in inputs if name in images]
            dims = {name: {0: torch.export.Dim.DYNAMIC} if name in images else None for name in inputs}
            with torch.no_grad():
                program = torch.export.export(model, (), inputs, dynamic_shapes=dims).module()
                for count in (1, 2, 3):
                    other = {**inputs, **{name: torch.cat([inputs[name]] * count) for name in names}}
                    torch.testing.assert_close(program(**other)[0], model(**other)[0])
''',
}


def fetch(cache: Path) -> Path:
    """The folder with the tests of the installed release. `SystemExit`: they can't be had, and why."""
    version = transformers.__version__
    if importlib.util.find_spec("parameterized") is None:
        refuse("the package `parameterized` is not installed, which they are written with")
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-binary",
            ":all:",
            "--no-deps",
            "--no-build-isolation",
        ]
        done = subprocess.run(
            [*command, "--dest", str(cache), f"transformers=={version}"], capture_output=True, text=True
        )
        if not archive.is_file():
            refuse(f"pip could not download the source distribution of transformers {version}: {done.stderr[-300:]}")
    folder = cache / f"tests-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / PACKAGE
    package.mkdir(parents=True)
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            parent, _, name = member.name.rpartition("/")
            if parent == f"transformers-{version}/tests" and name.endswith(".py") and member.isfile():
                (package / name).write_bytes(files.extractfile(member).read())
    for name, text in STAND_INS.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
    return folder


def refuse(why: str) -> None:
    print(f"transformers' common tests were not run: {why}.")
    raise SystemExit(SKIPPED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps the source distribution")
    args, rest = parser.parse_known_args()
    folder = fetch(args.cache.expanduser())
    shutil.copy(HERE / "common_cases.py", folder / "test_common_cases.py")
    paths = os.pathsep.join(filter(None, [str(folder), str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder)]
    command = [sys.executable, "-m", "pytest", *options, *(one for one in rest if one != "--")]
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, str(folder / "test_common_cases.py")], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
