#!/usr/bin/env bash
# From beginning to end: patches of two classes in; a trained flow, stairs from A to B, a video, figures and a report
# out, which a browser opens.
#
#   bash example.sh                                             made phantom tissue, nine minutes on two CPU cores
#   bash example.sh configs/my.yaml data.root=/my/patches       your own patches; key.sub=value overrides the file
#
# Sets up what is missing first. Run it again and it goes on where it was stopped.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
extra="" source "$here/setup.sh"

config="$here/configs/example.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then
    config="$1"
    shift
else
    cd "$here"
fi

# What is wrong with the settings is said before anything is trained.
cellflux-bridge run "$config" "$@" --dry-run

# While torch trains on a CPU, its threads wait for one another without falling asleep, which makes it a sixth faster; the
# other steps would be slower so.
OMP_WAIT_POLICY=ACTIVE cellflux-bridge train "$config" "$@"
cellflux-bridge run "$config" "$@"
