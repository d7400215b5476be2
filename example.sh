#!/usr/bin/env bash
# From beginning to end: patches of two classes in; a trained flow, stairs from A to B, a video, figures and a report
# out, which a browser opens.
#
#   bash example.sh                                             made phantom tissue, ten minutes on two CPU cores
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
# The guide steers; the judges, other networks, are asked afterwards.
cellflux-bridge train-classifier "$config" "$@" classifier.role=guide
cellflux-bridge translate "$run" "$@" --overwrite
cellflux-bridge video "$run" "$@"
cellflux-bridge train-classifier "$config" "$@" classifier.role=judge classifier.view=rgb
cellflux-bridge train-classifier "$config" "$@" classifier.role=judge classifier.view=grey
# A third network, which neither guided nor judges, measures fidelity.
cellflux-bridge train-classifier "$config" "$@" classifier.role=judge classifier.seed=1 output="$run/features"
cellflux-bridge classify "$run"
cellflux-bridge evaluate "$run" --judge "$run/judge_rgb" --judge "$run/judge_grey" \
    --features "$run/features/judge_rgb" --output "$run/metrics.json"
cellflux-bridge cellularity "$run" --output "$run/cellularity.json"
cellflux-bridge report "$run"
