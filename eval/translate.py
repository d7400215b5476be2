"""Carry held-out patches of one class to another and write the sequences.

python eval/translate.py runs/lung --source lung_n --target lung_aca translate.num=200
torchrun --nproc_per_node 8 eval/translate.py runs/mhist --source HP --target SSA
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("translate")
