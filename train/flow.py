"""Train a flow between tissue classes.

python train/flow.py configs/phantom.yaml
python train/flow.py configs/lung.yaml data.root=/data/lc25000_lung train.steps=2000
torchrun --nproc_per_node 8 train/flow.py configs/mhist.yaml data.root=/data/mhist
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("train")
