#!/usr/bin/env bash
# Sets up what is missing and runs the tests; arguments go to pytest, as in: bash tests/run.sh -k path
# Tests on real patches run where CELLFLUX_BRIDGE_DATA names the folder that holds lc25000_lung; else they skip.
# Tests of the report in a browser need Chromium (apt-get install chromium; Playwright, which drives it, comes with the
# dev extra); else they skip and say so.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra=dev source "$here/setup.sh"
cd "$here"
# The tests' arrays are tiny: threads that wait for each other cost more than they bring.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A file stays in one process, because its tests share what they trained.
python -m pytest -n "${PYTEST_WORKERS:-logical}" --dist loadfile "$@"
