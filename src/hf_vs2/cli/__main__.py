"""`python -m hf_vs2.cli`, and so `accelerate launch -m hf_vs2.cli train ...`."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
