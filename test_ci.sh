#!/usr/bin/env bash
# All tests, on the CPU of any machine, then a short run of each plugin as a user starts it.
#
#   bash test_ci.sh            arguments are passed to pytest: bash test_ci.sh -k launch
#   NEWEST=1 bash test_ci.sh   also with the newest versions of the libraries (installs them: 6 GB)

. "$(dirname -- "$0")/launcher/launch.sh"

export CUDA_VISIBLE_DEVICES='' # no GPU, also on a machine that has some
NEEDED="pytest pytest-timeout ruff mypy timm" install_environment

status=0
(cd "$HERE" && "$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && "$PYTHON" -m mypy) ||
  status=$?
# With NEWEST, matrix.sh compares these losses with those of the newest versions.
[ -z "${NEWEST:-}" ] || {
  mkdir -p "$HERE/.environments"
  export SEEN_LOSSES=$HERE/.environments/pinned.losses.json
  rm -f "$SEEN_LOSSES"
}
PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} \
  "$PYTHON" -m pytest -q --rootdir "$HERE" "$HERE/tests" "$@" || status=$?

PYTHON=$PYTHON bash "$HERE/tests/demos.sh" || status=$?

# The same with the newest versions of the libraries, in an environment of their own: tests/matrix.sh. It
# takes as long again, and CI ends after 90 minutes.
if [ -n "${CI:-}" ] && ((SECONDS > 2400)); then
  [ -z "${NEWEST:-}" ] || echo "The newest versions were NOT tested: $((SECONDS / 60)) minutes are gone."
elif [ -n "${NEWEST:-}" ]; then
  ENVIRONMENTS=$HERE/.environments bash "$HERE/tests/matrix.sh" newest || status=$?
fi
((status == 0))
