# Sourced by example.sh and tests/run.sh: makes sure that the package is installed, in the active virtual environment
# if there is one, else in .venv of this repository, which is made on first use.
# It reads two variables: `here`, the repository, and `extra`, the optional dependencies to install (may be empty). Not
# arguments, because a sourced file without any sees those of the script that sources it.

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -f "$here/.venv/bin/activate" ]; then  # written last: a half-made environment is made again
        python="$(command -v python3.11 || command -v python3)" || { echo "error: no python3 found; install Python 3.11 or newer" >&2; exit 1; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: $("$python" --version) is too old; install Python 3.11 or newer" >&2; exit 1; }
        echo "making a virtual environment in .venv"
        "$python" -m venv --clear "$here/.venv"
    fi
    source "$here/.venv/bin/activate"
fi

stamp="$VIRTUAL_ENV/.cellflux_bridge${extra:+_$extra}"
if ! cmp -s "$here/pyproject.toml" "$stamp" || ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("cellflux_bridge") is None)'; then
    echo "installing cellflux_bridge and what it needs (several GB on a first run: torch comes with its CUDA libraries)"
    python -m pip install --quiet -e "$here${extra:+[$extra]}"
    cp "$here/pyproject.toml" "$stamp"
fi
