#!/usr/bin/env bash
# The equality tests, a run of each plugin and a prediction with other versions of the libraries.
#
#   bash tests/matrix.sh                          all sets
#   bash tests/matrix.sh newest                   one of: pinned last4 newest
#   PYTHON=python3.12 bash tests/matrix.sh newest with another Python
#
# Each set gets an environment in ENVIRONMENTS (default: .environments in the project), which is kept. Losses
# are compared with those in tests/golden, which the pinned set recorded on another machine, and with those of
# the pinned set on this one, to 1e-6: run it first. Prints a row of a table per set.

set -uo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
export CUDA_VISIBLE_DEVICES=''
environments=${ENVIRONMENTS:-$HERE/.environments}
python=${PYTHON:-python3}
LAST_4=transformers==4.57.6
TESTS=(tests/unit/test_model.py tests/unit/test_attention_kernel.py tests/golden/test_golden.py -k
  "test_model or test_attention_kernel or losses or checkpoint_of_an_earlier_program")

install_set() { # NAME FOLDER
  [ -x "$2/bin/python" ] || "$python" -m venv "$2" || return
  local versions=pinned
  [ "$1" != newest ] || versions=newest
  env -u PYTHON VIRTUAL_ENV="$2" VERSIONS="$versions" NEEDED="pytest pytest-timeout" INSTALL=1 \
    bash -c 'source "$0/launcher/launch.sh"; install_environment' "$HERE" || return
  [ "$1" != last4 ] || "$2/bin/python" -m pip install -q --disable-pip-version-check "$LAST_4"
}

outcome() { if "$@"; then result=works; else result=fails; fi; }

# NAME PYTHON: prints by how much a loss in fp32 differs from the pinned set's; status 1 above 1e-6
compare_losses() {
  local pinned=$environments/pinned.losses.json table=$environments/$1.differences.md status=0
  [ "$1" != pinned ] || { echo - && return; }
  [ -f "$pinned" ] || { echo "not compared: no pinned set" && return 1; }
  "$2" "$HERE/tests/equal_losses.py" "$pinned" "$environments/$1.losses.json" >"$table" || status=1
  cat "$table" >&2
  sed -n 's/^fp32: largest relative difference \([^,]*\).*/\1/p' "$table"
  return "$status"
}

measure() { # NAME: prints the row on descriptor 3
  local folder=$environments/$1 losses=$environments/$1.losses.json started=$SECONDS
  local installed tests difference equal=works demos result
  install_set "$1" "$folder" || return
  installed=$((SECONDS - started))
  rm -f "$losses"
  outcome env SEEN_LOSSES="$losses" "$folder/bin/python" -m pytest -q --rootdir "$HERE" "${TESTS[@]}"
  tests=$result
  difference=$(compare_losses "$1" "$folder/bin/python") || equal=fails
  outcome env PYTHON="$folder/bin/python" bash "$HERE/tests/demos.sh"
  demos=$result
  "$folder/bin/python" - "$1" "$tests" "$difference" "$demos" \
    "$installed s, $(du -shD "$folder" | cut -f1)" >&3 <<'END'
import importlib.metadata, platform, sys
name, *cells = sys.argv[1:]
versions = [importlib.metadata.version(package) for package in ("torch", "transformers")]
print("|", " | ".join([name, platform.python_version(), *versions, *cells]), "|")
END
  [ "$tests $equal $demos" = "works works works" ]
}

cd "$HERE" || exit
[ $# -gt 0 ] || set -- pinned last4 newest
rows=$(mktemp) status=0
trap 'rm -f "$rows"' EXIT
exec 3>"$rows"
for name in "$@"; do
  [[ $name =~ ^(pinned|last4|newest)$ ]] || { echo "matrix: no set $name" >&2; exit 2; }
  measure "$name" || status=1
done
echo "| set | Python | torch | transformers | losses, checkpoints | differ by | plugins, prediction |" \
  "install |"
echo "|---|---|---|---|---|---|---|---|"
cat "$rows"
exit "$status"
