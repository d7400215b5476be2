"""Write mp4, WebP, GIF or strip of translated sequences.

python eval/video.py runs/lung/trajectories/lung_n_to_lung_aca_progression video.fps=12 video.sequences=6
"""

import sys

from cellflux_bridge.cli import main

if __name__ == "__main__":
    main(["video", *sys.argv[1:]])
