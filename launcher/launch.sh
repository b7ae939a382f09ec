# shellcheck shell=bash
# Sourced by the run scripts. They call, in this order,
#
#   install_environment       find or create a Python environment; sets PYTHON
#   launch SCRIPT ARGS...     check the settings, then start SCRIPT on GPUNUM processes
#
# and may call count_gpus, count_processes and count_nodes. The current folder is not changed, so relative
# paths stay relative to the folder of the user. Variables, all from the environment:
#
#   INSTALL=0        install nothing, check nothing
#   VERSIONS         pinned or newest (default: docs/versions.md)
#   PYTHON           the interpreter to use, instead of the active environment's
#   GPUNUM           auto: one GPU, or 2 processes without a GPU; all: every GPU; or a number
#   LAUNCHER         colossalai (colossalai run) or torchrun
#   MASTER_PORT      default: a free port
#   LAUNCH_ENV       more variables for the machines of HOSTFILE: names, or NAME* for all that begin so
#   LAUNCH_ARGS      more options of the launcher, such as --ssh-port=2222
#
# Several machines need this folder and the Python environment at the same paths, and one MASTER_PORT; GPUNUM
# is the number per machine. HOSTFILE has one host per line, which ssh reaches without a password. With
# torchrun, start it on each machine:
#
#   HOSTFILE=hosts MASTER_PORT=29500 bash run_demo.sh
#   LAUNCHER=torchrun NNODES=2 LAUNCH_ARGS='--nnodes=2 --node_rank=0' \
#     MASTER_ADDR=host0 MASTER_PORT=29500 bash run_demo.sh

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh run_demo.sh
set -euo pipefail
[ "$(uname -s)" = Linux ] || {
  echo "launch: this needs Linux; on Windows use WSL, on macOS a Linux container" >&2
  exit 2
}
HERE=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) # the project
export PYTHONUTF8=1 # names of classes and images are UTF-8, whatever the locale says

say() { printf 'launch: %s\n' "$*"; }
die() {
  printf 'launch: %s\n' "$*" >&2
  return 2
}
helper() { "$PYTHON" "$HERE/launcher/launch.py" "$@"; }
packages() { "$PYTHON" "$HERE/launcher/install.py" "$@"; }

# --- environment ---

# Sets PYTHON: the active environment, otherwise .venv in the project, otherwise a system Python that has all
# packages, otherwise a new .venv.
choose_python() {
  local prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [ -n "${PYTHON:-}" ]; then
    command -v -- "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not a program"
  elif [ -n "$prefix" ]; then
    PYTHON=$prefix/bin/python
    [ -x "$PYTHON" ] || die "the active environment has no $PYTHON: create it again, or deactivate it"
  elif [ -x "$HERE/.venv/bin/python" ]; then
    PYTHON=$HERE/.venv/bin/python
  else
    PYTHON=$(command -v python3) || die "there is no python3 on the PATH" || return
    [ "${INSTALL:-1}" = 0 ] || packages check >/dev/null || make_venv
  fi
}

make_venv() {
  local candidate
  for candidate in python3 python3.12 python3.11 python3.10 python3.13; do
    "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null || continue
    say "making $HERE/.venv with $candidate"
    if "$candidate" -m venv "$HERE/.venv" >/dev/null 2>&1; then
      PYTHON=$HERE/.venv/bin/python
      return
    fi
    rm -rf "$HERE/.venv" # incomplete, it would be used by the next call
    die "$candidate cannot create a virtual environment: install its venv module" \
      "(Debian, Ubuntu: apt install python3-venv), or activate an environment of your own"
    return
  done
  die "no Python 3.10 to 3.13 on the PATH: install one, or activate an environment that has it"
}

# An environment that has all packages is used as it is: a GPU machine may have newer builds of torch and no
# package registry. NEEDED: optional packages that the calling script needs. VERSIONS: pinned or newest, see
# install.py.
install_environment() {
  choose_python || return
  [ "${INSTALL:-1}" != 0 ] || return 0
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$PYTHON is not Python 3.10 or later" || return
  # shellcheck disable=SC2086 # NEEDED is a list
  packages check ${NEEDED:-} || packages install ${NEEDED:-}
}

# --- processes ---

count_gpus() { helper gpus; }

# GPUNUM as a number.
count_processes() {
  local gpus wanted=${GPUNUM:-auto}
  gpus=$(count_gpus) || return
  case $wanted in
    auto) wanted=$((gpus ? 1 : 2)) ;;
    all) wanted=$((gpus ? gpus : 2)) ;;
    0* | *[!0-9]* | ?????*)
      die "GPUNUM=$wanted is neither auto nor all nor a number from 1 to 9999" || return
      ;;
  esac
  if [ -z "${HOSTFILE:-}" ] && ((gpus && wanted > gpus)); then
    die "GPUNUM=$wanted is more than the GPUs this process may use: $gpus" \
      "${CUDA_VISIBLE_DEVICES:+(CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES)}"
  else
    echo "$wanted"
  fi
}

# Number of machines.
count_nodes() {
  if [ -n "${NNODES:-}" ]; then
    echo "$NNODES"
  elif [ -n "${HOSTFILE:-}" ]; then
    helper hosts "$HOSTFILE"
  else
    echo 1
  fi
}

# Returns the status of the script; 130 or 143 after Ctrl-C or SIGTERM, when all processes have saved and
# ended.
launch() {
  local script=$1 launcher=${LAUNCHER:-colossalai} address=${MASTER_ADDR:-} port=${MASTER_PORT:-} nodes=1
  local processes options extra parent pid status=0
  shift
  # Left over from another launch: these are decided below.
  if [ -n "${RANK:-}${WORLD_SIZE:-}" ]; then
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID
    [ -n "${HOSTFILE:-}${NNODES:-}" ] || { unset MASTER_ADDR MASTER_PORT && address='' port=''; }
  fi
  # The user of a container may have no name; `colossalai run` asks for one.
  [ -n "${LOGNAME:-}${USER:-}" ] || export USER="$(id -un 2>/dev/null || id -u)"
  [[ $launcher =~ ^(colossalai|torchrun)$ ]] ||
    die "LAUNCHER=$launcher is neither colossalai nor torchrun" || return
  # `colossalai run` passes the next two to a shell.
  [[ $address =~ ^[[:alnum:].:_-]*$ ]] || die "MASTER_ADDR=$address is not a host name or address" || return
  [[ ${LAUNCH_ARGS:-} =~ ^[[:alnum:]\ .,:=_/-]*$ ]] ||
    die "LAUNCH_ARGS=$LAUNCH_ARGS is not a list of options" || return
  [[ ${NNODES:-1} =~ ^[1-9][0-9]{0,4}$ ]] || die "NNODES=$NNODES is not a number of machines" || return
  read -ra extra <<<"${LAUNCH_ARGS:-}"
  processes=$(count_processes) || return
  options=("--nproc_per_node=$processes" "--master_addr=${address:-127.0.0.1}")
  if [ -n "${HOSTFILE:-}" ]; then
    [ "$launcher" = colossalai ] || die "HOSTFILE needs LAUNCHER=colossalai" || return
    nodes=$(helper hosts "$HOSTFILE") || return
    options+=("--hostfile=$(realpath -- "$HOSTFILE")")
  fi
  nodes=${NNODES:-$nodes}
  if ((nodes == 1)); then
    port=$(helper port "${port:-0}") || return
  elif [ -z "$port" ]; then # a port that is free on this machine may be in use on another
    die "several machines need MASTER_PORT: a port that is free on the first, the same for all" || return
  fi
  options+=("--master_port=$port" ${extra[@]+"${extra[@]}"})

  # All settings are checked together before anything is started. CHECKED: the caller has done that.
  [ -n "${CHECKED:-}" ] || "$PYTHON" "$script" "$@" --check --world_size "$((processes * nodes))" || return

  # The processes print through pipes, so they cannot see whether stderr is a terminal, and how wide it is.
  [ -n "${PROGRESS:-}" ] ||
    { [ -t 2 ] && PROGRESS=1 COLUMNS=$(tput cols 2>/dev/null || echo 100); } || PROGRESS=0
  export PROGRESS COLUMNS

  # In the background, because bash runs a trap only after a foreground command has ended. LAUNCH_PARENT: who
  # has to be alive.
  parent=$BASHPID
  LAUNCH_PARENT=$parent "$PYTHON" "$HERE/launcher/launch.py" "$launcher" "${options[@]}" -- "$script" "$@" &
  pid=$!
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM
  trap 'kill -INT "$pid" 2>/dev/null || true' INT
  while true; do # a signal ends `wait` early
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  trap - INT TERM
  return "$status"
}
