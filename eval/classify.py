"""Ask classifiers how many translated patches they call the target class, beside untranslated and recoloured ones.

    python eval/classify.py runs/lung/trajectories/lung_n_to_lung_aca_progression \
        --classifier runs/lung/judge_rgb --classifier runs/lung/judge_grey
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("classify")
