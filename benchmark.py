"""Measure several plugins, precisions and batch sizes, each in a fresh launch.

`bash run_benchmark.sh` calls it.
"""

import os
import sys

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai

from args import benchmark_cases
from vit.benchmark import main

if __name__ == "__main__":
    if "PROCESSES" not in os.environ:
        sys.exit("error: run_benchmark.sh sets what this program needs: bash run_benchmark.sh")
    sys.exit(main(benchmark_cases))
