"""Measure several plugins, precisions and batch sizes, each in a fresh launch. `bash run_benchmark.sh` calls it."""

import sys

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai

from args import benchmark_cases  # noqa: E402
from vit.benchmark import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(benchmark_cases))
