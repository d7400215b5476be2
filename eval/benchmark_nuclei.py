"""Time nuclei counting at every size, one process.

OMP_NUM_THREADS=1 python eval/benchmark_nuclei.py
OMP_NUM_THREADS=1 python eval/benchmark_nuclei.py --largest 320
"""

import sys

from cellflux_bridge.cellularity.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])
