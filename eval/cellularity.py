"""Count nuclei along trajectories, beside real patches; in a folder of images; or against annotations.

python eval/cellularity.py runs/lung/trajectories/lung_n_to_lung_aca_progression --output cellularity.json
python eval/cellularity.py my/trajectory --real-source patches/benign --real-target patches/tumour --mpp 0.5
python eval/cellularity.py --images patches/tumour --mpp 0.5 --output nuclei.csv
python eval/cellularity.py --annotated breastpathq.csv
python eval/cellularity.py --label-maps dsb2018_nuclei
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("cellularity")
