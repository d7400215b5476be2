"""Train a network that finds nuclei, on folders of images with label maps.

python train/nuclei.py configs/nuclei.yaml
python train/nuclei.py configs/nuclei.yaml network.init_from=built-in train.steps=500     # go on from the built-in one
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("train-nuclei")
