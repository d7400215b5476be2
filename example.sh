#!/usr/bin/env bash
# The main job from beginning to end: patches of two classes in; a trained flow, stairs from A to B and a video out.
#
#   bash example.sh                                             made phantom tissue, a few minutes on two CPU cores
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

run="$(cellflux-bridge config show "$config" "$@" --key output)"
cellflux-bridge train "$config" "$@"
# The guide steers; the judge, another network, is asked afterwards.
cellflux-bridge train-classifier "$config" "$@" classifier.role=guide
cellflux-bridge translate "$run" "$@" --overwrite
cellflux-bridge video "$run" "$@"
cellflux-bridge train-classifier "$config" "$@" classifier.role=judge
cellflux-bridge classify "$run"
