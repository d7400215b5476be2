"""Write mp4, WebP, GIF or strip of translated sequences.

python eval/video.py runs/lung/trajectories/lung_n_to_lung_aca_progression video.fps=12 video.sequences=6
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("video")
