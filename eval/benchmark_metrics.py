"""Time and peak memory of features and metrics, of noise instead of patches, by a classifier of random weights.

python eval/benchmark_metrics.py                     # 10,000 images of 64 px, 2 threads
python eval/benchmark_metrics.py --images 2000       # to see how it grows: features linearly, distances with the square
"""

import sys

from cellflux_bridge.metrics.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])
