#!/usr/bin/env bash
# Measure each plugin's training speed and memory on synthetic images. Change a value in this file, or for one
# run in front of the command; flags are passed on to vit_benchmark.py:
#
#   bash run_benchmark.sh
#   PRESET=fast BATCH_SIZES="8 32 128" PLUGINS="torch_ddp none:bf16:eager" bash run_benchmark.sh --windows 7
#
# Cases that were measured are skipped: run it again after an interruption, or with more batch sizes.

MODEL=${MODEL:-auto}                    # hub name or preset; auto: google/vit-base-patch16-224 | vit-demo
PLUGINS=${PLUGINS:-auto}                # plugin[:precision][:compile or :eager]; auto: all, plain PyTorch
BATCH_SIZES=${BATCH_SIZES:-8 32}        # images per step and data-parallel rank
PRESET=${PRESET:-auto}                  # precision and memory: published, fast, cpu; auto: published | by CPU
GPUNUM=${GPUNUM:-1}                     # processes, one per GPU; all: every GPU
TP_SIZE=${TP_SIZE:-1}                   # tensor-parallel size: GPUs that share each layer (hybrid_parallel)
PP_SIZE=${PP_SIZE:-1}                   # pipeline size: GPUs that share the stack of layers (hybrid_parallel)
NUM_LABELS=${NUM_LABELS:-1000}          # outputs of the classifier
LR=${LR:-1e-4}                          # learning rate of the timed steps
WEIGHT_DECAY=${WEIGHT_DECAY:-0.05}      # of the matrices
RESULTS=${RESULTS:-./benchmark_results} # folder of rows.jsonl, table.md, table.csv and charts

# documents INSTALL, LAUNCHER, HOSTFILE and other variables
. "$(dirname -- "$0")/launcher/launch.sh"

install_environment
GPUS=$(count_gpus)
processes=$(count_processes)
nodes=$(count_nodes)
PROCESSES=$((processes * nodes))
export GPUNUM PLUGINS BATCH_SIZES PRESET RESULTS GPUS PROCESSES
((GPUS)) || [ "$MODEL" != auto ] ||
  echo "no GPU: measuring the small vit-demo in few steps (MODEL chooses another)"
exec "$PYTHON" "$HERE/benchmark.py" \
  --model_name_or_path "$MODEL" \
  --preset "$PRESET" \
  --tp_size "$TP_SIZE" \
  --pp_size "$PP_SIZE" \
  --num_labels "$NUM_LABELS" \
  --learning_rate "$LR" \
  --weight_decay "$WEIGHT_DECAY" \
  "$@"
