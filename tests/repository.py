"""The checkout, and what git knows of it."""

import subprocess
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]


def tracked_files() -> list[Path]:
    """What git tracks or would track; a source archive without git is taken whole."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files of {REPOSITORY}: {error}")
    names = listing.stdout.decode().split("\0")
    return [REPOSITORY / name for name in names if name and (REPOSITORY / name).is_file()]
