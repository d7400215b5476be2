"""Make treated cells from controls of their batch, and compare them with real ones by CellFlux's protocol.

python eval/perturbations.py runs/bbbc021 --beside runs/bbbc021_noise --moa moa.csv
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("perturbations")
