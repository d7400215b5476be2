"""Train a classifier of patches, to judge translated ones with.

python train/classifier.py configs/lung.yaml data.root=/data/lc25000_lung classifier.view=rgb
python train/classifier.py configs/lung.yaml data.root=/data/lc25000_lung classifier.view=grey
"""

import sys

from cellflux_bridge.cli import main

if __name__ == "__main__":
    main(["train-classifier", *sys.argv[1:]])
