"""Train a classifier of patches: a judge of translated ones, or a guide of the flow, which are never the same network.

python train/classifier.py configs/lung.yaml data.root=/data/lc25000_lung classifier.view=rgb
python train/classifier.py configs/lung.yaml data.root=/data/lc25000_lung classifier.view=grey
python train/classifier.py configs/lung.yaml data.root=/data/lc25000_lung classifier.role=guide
python train/classifier.py configs/lung.yaml data.root=/data/lc25000_lung classifier.role=guide classifier.sees=state
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("train-classifier")
