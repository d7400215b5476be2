#!/usr/bin/env bash
# The main job from beginning to end: patches of two classes in; a trained flow, sequences from A to B and a video out.
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
cellflux-bridge translate "$run" "$@" --overwrite
cellflux-bridge video "$run" "$@"
# Two judges that the flow never saw: one of colour, one of structure (grey, each patch's own contrast taken out).
for view in rgb grey; do
    cellflux-bridge train-classifier "$config" "$@" classifier.view="$view"
done
cellflux-bridge classify "$run"
