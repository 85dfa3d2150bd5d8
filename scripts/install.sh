#!/bin/sh
# Make a virtual environment of our own and install hf_vs2 into it. Called by the Makefile; needs only a POSIX shell.
#
#   scripts/install.sh VENV EXTRA CONSTRAINTS        e.g. scripts/install.sh .venv test constraints.txt
#
# PYTHON names the interpreter to make the environment with (default: the first one on PATH that is recent enough).
# No environment that someone else made is touched, an activated one included.
set -eu

venv=${1:?no folder for the environment given (make VENV=DIR)}
extra=$2
constraints=$3
marker=$venv/.made-by-hf-vs2

fail() {
    printf '\n' >&2
    printf 'hf_vs2: %s\n' "$@" >&2
    exit 1
}

version_of() {
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Print the interpreter to use, or say which ones were found and why none will do.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.14 python3.13 python3.12 python3.11 python
    fi
    found=
    for candidate in "$@"; do
        version=$(version_of "$candidate") || continue
        if is_recent "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        found="$found${found:+,} $candidate is $version"
    done
    fail "Python 3.11 or newer is needed. Looked for: $*. Found:${found:- none of them}." \
        "Install one, or name the one you have: make PYTHON=/path/to/python3.11 ..."
}

make_environment() {
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail \
        "$python ($(version_of "$python")) has no venv module, so no environment can be made." \
        "Debian and Ubuntu: apt install python3-venv. Elsewhere: your system's package for it, or another PYTHON=..."
    echo "hf_vs2: making $venv with $python ($(version_of "$python"))"
    mkdir -p "$venv"
    : > "$marker"
    "$python" -m venv "$venv" || fail "$python could not make $venv: its message is above."
}

if [ -e "$venv" ] && [ ! -e "$marker" ]; then
    fail "$venv exists and was not made by this Makefile, so it is left alone." \
        "Name another place (make VENV=.venv-hf-vs2 ...), or remove $venv yourself."
fi
# Also where the interpreter it was made from has gone.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    make_environment
fi

echo "hf_vs2: installing the package with its '$extra' extra into $venv (the first time takes minutes and needs a network)"
"$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$constraints" --editable ".[$extra]" || fail \
    "The installation did not finish: pip's own message is above. What to check:" \
    "- no network, or a proxy: packages come from your package index; once installed, no network is needed;" \
    "- no build of a pinned release for this machine: change $constraints, or install by hand (README.md);" \
    "- a full disk: the environment takes about 2 GB, more where torch brings CUDA libraries." \
    "Then run the same command again; nothing has to be cleaned up."
