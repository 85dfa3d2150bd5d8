"""The version, which artefacts record, and how hf_vs2 is installed, which messages and model cards say."""

__version__ = "0.2.0.dev0"

# On the day when it is on PyPI this line becomes "`pip install -U hf_vs2`". README.md, docs/installation.md and
# examples/space/requirements.txt say it in their own words; tests/test_installation.py finds what was left behind.
INSTALLATION = "`pip install .` in a clone of its repository (hf_vs2 is not on PyPI)"
