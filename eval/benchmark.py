"""Time nuclei counting at every size, one process.

OMP_NUM_THREADS=1 python eval/benchmark.py
"""

from cellflux_bridge.cellularity.benchmark import main

if __name__ == "__main__":
    main()
