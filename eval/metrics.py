"""Judge methods side by side: fidelity, calibration, preservation, severity and cost, with baselines and floors.

    python eval/metrics.py runs/lung/trajectories/lung_n_to_lung_aca_progression runs/ddim_lung \
        --judge runs/judges/judge_rgb --judge runs/judges/judge_grey --features nuclei
    python eval/metrics.py runs/phantom --judge runs/phantom/judge_rgb --features runs/extractor/judge_rgb \
        --scores runs/severity/judge_rgb --unguided runs/phantom/trajectories/unguided --output metrics.json
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("evaluate")
