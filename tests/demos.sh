#!/usr/bin/env bash
# A short run of each plugin as a user starts it, on 2 processes, and a prediction with the last model.
# INSTALL=0: the environment of PYTHON is used as it is.
#
#   PYTHON=/path/to/python bash tests/demos.sh

set -uo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

list="from vit.parallel.plugins import PLUGINS; print(*PLUGINS)"
plugins=$(PYTHONPATH=$here "$PYTHON" -c "$list") || exit
passed=0 failed=0
count() { if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi; }

for plugin in $plugins; do
  echo "--- $plugin"
  tensor_parallel=1
  [ "$plugin" != hybrid_parallel ] || tensor_parallel=2
  count env INSTALL=0 MODEL=vit-demo DATASET=drawn OUTPUT_PATH="$work/$plugin" PLUGIN="$plugin" GPUNUM=2 \
    TP_SIZE="$tensor_parallel" BS=4 EPOCH=1 \
    bash "$here/run_demo.sh" --max_train_samples 32 --max_eval_samples 16
done

echo "--- prediction"
draw="import sys; from PIL import Image; Image.new('RGB', (80, 60), (40, 120, 50)).save(sys.argv[1])"
"$PYTHON" -c "$draw" "$work/image.png"
count "$PYTHON" "$here/vit_predict.py" --model "$work/$plugin" "$work/image.png"

echo "$passed passed, $failed failed"
((failed == 0))
