#!/usr/bin/env bash
# Fine-tune with every combination of the lists below, and compare. Change a value here, or for one call in front of
# the command; flags are passed on to vit_train_demo.py:
#
#   bash run_finetuning.sh
#   PLUGINS="torch_ddp gemini" LR=1e-4 BS=32 SEEDS="1 2 3" RESULTS=./plugins bash run_finetuning.sh --image_size 384
#
# Finished runs are skipped, interrupted ones resume: call again after Ctrl-C, or with longer lists. A list holds
# values between blanks; what run_demo.sh calls MODEL, PLUGIN, BS, LR and SEED is a list of one. TP_SIZE and PP_SIZE
# are flags here.
# auto is the published grid; without a GPU, and with MODELS auto, a small one of some minutes.

PLUGINS=${PLUGINS:-${PLUGIN:-auto}}               # training strategies, names in plugins.py; auto: gemini | torch_ddp
MODELS=${MODELS:-${MODEL:-auto}}                  # hub names, folders or presets; auto: google/vit-base-patch16-224 | vit-demo
BATCH_SIZES=${BATCH_SIZES:-${BS:-auto}}           # images per step and data-parallel group; auto: 8 16 32 | 16 32
LEARNING_RATES=${LEARNING_RATES:-${LR:-auto}}     # peaks; auto: 1e-4 2e-4 5e-4 | 5e-4 1e-3
RECIPES=${RECIPES:-none}                          # further flags to compare, between bars: "none | --augment | --augment --ema 0.99"
FOLDS=${FOLDS:-none}                              # "1/5 2/5 3/5 4/5 5/5": validate on these parts of train, to choose by; none: the validation split
SEEDS=${SEEDS:-${SEED:-42}}                       # several: the table has their mean and spread
DATASET=${DATASET:-auto}                          # hub name, image folder or drawn; auto: AI-Lab-Makerere/beans | drawn
PRESET=${PRESET:-auto}                            # precision and memory: published, fast or cpu; auto: published | cpu
EPOCH=${EPOCH:-auto}                              # passes over the training images; auto: 5 | 2
WEIGHT_DECAY=${WEIGHT_DECAY:-0.5}                 # pull of the weights towards zero
WARMUP_RATIO=${WARMUP_RATIO:-0.3}                 # share of the steps over which the learning rate rises
GPUNUM=${GPUNUM:-1}                               # processes of each run, one a GPU
PARALLEL_RUNS=${PARALLEL_RUNS:-auto}              # runs side by side, each on its own GPU; more than GPUs: they share; all: one a GPU; auto: 1 | up to 4
RESULTS=${RESULTS:-./finetuning_results}          # a folder for each run, logs, table.md, table.csv and charts

source "$(dirname -- "${BASH_SOURCE[0]}")/launcher/launch.sh" # which documents INSTALL and LAUNCHER

[ -z "${HOSTFILE:-}" ] || die "the runs of a sweep stay on this machine: leave HOSTFILE out"
[ -z "${TP_SIZE:-}${PP_SIZE:-}${OUTPUT_PATH:-}" ] ||
  die "TP_SIZE, PP_SIZE and OUTPUT_PATH are of run_demo.sh: here write --tp_size 2 --pp_size 2 behind the command, and RESULTS for OUTPUT_PATH"
install_environment
processes=$(count_processes)
exec "$PYTHON" "$HERE/sweep.py" \
  --plugins "$PLUGINS" \
  --models "$MODELS" \
  --batch_sizes "$BATCH_SIZES" \
  --learning_rates "$LEARNING_RATES" \
  --recipes="$RECIPES" \
  --folds "$FOLDS" \
  --seeds "$SEEDS" \
  --dataset "$DATASET" \
  --preset "$PRESET" \
  --num_epoch "$EPOCH" \
  --weight_decay "$WEIGHT_DECAY" \
  --warmup_ratio "$WARMUP_RATIO" \
  --processes "$processes" \
  --parallel_runs "$PARALLEL_RUNS" \
  --launcher "${LAUNCHER:-colossalai}" \
  --results "$RESULTS" \
  "$@"
