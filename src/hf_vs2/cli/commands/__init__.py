"""One module a command: `hf-vs2 NAME` is `NAME.py`. The package `cli` says what such a module has."""
