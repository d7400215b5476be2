"""Compare augmentations: python train/study.py configs/study_example.yaml [key.sub=value ...]"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("study")
