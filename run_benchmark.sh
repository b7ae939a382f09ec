#!/usr/bin/env bash
# Measure each plugin's training speed and memory on synthetic images. Change a value here, or for one run in front
# of the command; flags are passed on to vit_benchmark.py:
#
#   bash run_benchmark.sh
#   PRESET=fast BATCH_SIZES="8 32 128" PLUGINS="torch_ddp none:bf16:compile" bash run_benchmark.sh --windows 7
#
# What is measured already is skipped: call again after an interruption, or with more batch sizes.

MODEL=${MODEL:-auto}                  # known name or preset; auto: google/vit-base-patch16-224, or vit-demo without a GPU
PLUGINS=${PLUGINS:-auto}              # plugin[:precision][:compile] ...; auto: all five, and plain PyTorch as none:...
BATCH_SIZES=${BATCH_SIZES:-8 32}      # images per data-parallel group and step
PRESET=${PRESET:-auto}                # published, fast or cpu; auto: published, or cpu without a GPU
GPUNUM=${GPUNUM:-1}                   # processes, one a GPU; all: every GPU
TP_SIZE=${TP_SIZE:-1}                 # GPUs that share each layer (hybrid_parallel)
PP_SIZE=${PP_SIZE:-1}                 # GPUs that share the stack of layers (hybrid_parallel)
NUM_LABELS=${NUM_LABELS:-1000}        # size of the classifier
LR=${LR:-1e-4}                        # learning rate
WEIGHT_DECAY=${WEIGHT_DECAY:-0.05}    # of the matrices
RESULTS=${RESULTS:-./benchmark_results} # folder of rows.jsonl, table.md, table.csv and charts

source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh" # which documents INSTALL, LAUNCHER, HOSTFILE and the rest

install_environment
gpus=$(count_gpus)
if [ "$PLUGINS" = auto ]; then
  PLUGINS="torch_ddp torch_ddp_fp16 low_level_zero gemini hybrid_parallel"
  case $PRESET in
    fast) PLUGINS+=" none:bf16 none:bf16:compile" ;;
    *) ((gpus)) && PLUGINS+=" none:fp32 none:fp16" || PLUGINS+=" none" ;;
  esac
fi
((gpus)) || [ "$MODEL" != auto ] || echo "no GPU: measuring the small vit-demo in few steps (MODEL chooses another)"

read -ra batch_sizes <<<"$BATCH_SIZES"
read -ra entries <<<"$PLUGINS"
rows=$RESULTS/rows.jsonl
count_rows() { [ ! -f "$rows" ] && echo 0 || wc -l <"$rows"; }

# Sets `command`: what measures an entry of PLUGINS.
command_of() {
  local plugin precision compile entry=$1
  shift
  IFS=: read -r plugin precision compile <<<"$entry"
  [ "$precision" != compile ] || precision='' compile=compile
  command=("$HERE/vit_benchmark.py" --model_name_or_path "$MODEL" --preset "$PRESET" --batch_size "${batch_sizes[@]}"
    --tp_size "$TP_SIZE" --pp_size "$PP_SIZE" --num_labels "$NUM_LABELS" --learning_rate "$LR"
    --weight_decay "$WEIGHT_DECAY" --results "$rows" --plugin "$plugin" --precision "${precision:-auto}")
  [ -z "$compile" ] || command+=(--compile)
  command+=("$@")
}

for entry in "${entries[@]}"; do # a wrong one is told before the first is measured
  command_of "$entry" "$@"
  "$PYTHON" "${command[@]}" --check_settings || exit
done
failed=0 done=0 timed=0 spent=0
for entry in "${entries[@]}"; do
  command_of "$entry" "$@"
  left=$((timed ? spent * (${#entries[@]} - done) / timed : 0))
  echo "--- $((done + 1)) of ${#entries[@]}: $entry, batch sizes $BATCH_SIZES$( ((timed == 0)) || echo ", about $((left / 60)) min $((left % 60)) s left")"
  before=$(count_rows) began=$SECONDS
  # As often as there are cases: one that ended its process has a row, and the rest want a fresh process.
  for _ in "${batch_sizes[@]}" last; do
    at=$(count_rows) status=0
    launch "${command[@]}" --known_from "$before" || status=$?
    case $status in
      0 | 76) break ;;                 # 76: all measured before, or impossible here
      2 | 130 | 143) exit "$status" ;; # wrong settings; stopped
    esac
    tail -n "+$((at + 1))" "$rows" 2>/dev/null | grep -qE '"status": "(failed|out of memory)"' ||
      "$PYTHON" "${command[@]}" --world_size "$(count_processes)" --known_from "$before" --record_failure "its processes ended with status $status"
  done
  failed=$((failed + $(tail -n "+$((before + 1))" "$rows" 2>/dev/null | grep -c '"status": "failed"' || true)))
  # entries that were measured before take no time
  [ "$(count_rows)" = "$before" ] || timed=$((timed + 1)) spent=$((spent + SECONDS - began))
  done=$((done + 1))
done
"$PYTHON" "$HERE/report.py" benchmark "$RESULTS"
((failed == 0)) || { echo "$failed case(s) did not run: see the rows with status failed in $rows" >&2; exit 1; }
