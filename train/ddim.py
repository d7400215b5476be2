"""Train the reference bridge: a denoiser, then a classifier of noised patches.

python train/ddim.py configs/ddim_phantom.yaml
python train/ddim.py configs/ddim_lung.yaml data.root=/data/lc25000_lung
python train/ddim.py runs/ddim_lung ddim.denoiser.train.max_cpu_minutes=30    # goes on where it was stopped
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("train-ddim")
