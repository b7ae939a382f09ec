#!/usr/bin/env bash
# All tests, on the CPU of any machine, then a short run of each plugin as a user starts it.
#
#   bash test_ci.sh            arguments are passed to pytest: bash test_ci.sh -k launch

source "$(dirname -- "${BASH_SOURCE[0]}")/launcher/launch.sh"

export CUDA_VISIBLE_DEVICES='' # no GPU, also on a machine that has some
NEEDED="pytest ruff mypy" install_environment

status=0
(cd "$HERE" && "$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && "$PYTHON" -m mypy) ||
  status=$?
PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} \
  "$PYTHON" -m pytest -q --rootdir "$HERE" "$HERE/tests" "$@" || status=$?

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

passed=0 failed=0
list="from vit.parallel.plugins import PLUGINS; print(*PLUGINS)"
plugins=$(PYTHONPATH=$HERE "$PYTHON" -c "$list") || status=$?
for plugin in $plugins; do
  echo "--- $plugin"
  tensor_parallel=1
  [ "$plugin" != hybrid_parallel ] || tensor_parallel=2
  if env INSTALL=0 PYTHON="$PYTHON" MODEL=vit-demo DATASET=drawn OUTPUT_PATH="$work/$plugin" \
    PLUGIN="$plugin" GPUNUM=2 TP_SIZE="$tensor_parallel" BS=4 EPOCH=1 \
    bash "$HERE/run_demo.sh" --max_train_samples 32 --max_eval_samples 16; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
done

echo "$passed passed, $failed failed"
((status == 0 && failed == 0))
