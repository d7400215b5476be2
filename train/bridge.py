"""Train the reference bridge: a denoiser, then a classifier of noised patches.

python train/bridge.py configs/bridge_phantom.yaml
python train/bridge.py configs/bridge_lung.yaml data.root=/data/lc25000_lung
python train/bridge.py runs/bridge_lung bridge.denoiser.train.max_cpu_minutes=30    # goes on where it was stopped
"""

import sys

from cellflux_bridge.cli import main

if __name__ == "__main__":
    main(["train-bridge", *sys.argv[1:]])
