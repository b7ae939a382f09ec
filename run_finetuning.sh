#!/usr/bin/env bash
# Fine-tune with every combination of the lists below, and compare the runs. Change a value in this file, or
# for one call in front of the command; flags are passed on to vit_train_demo.py:
#
#   bash run_finetuning.sh
#   PLUGINS="torch_ddp gemini" LR=1e-4 BS=32 SEEDS="1 2 3" bash run_finetuning.sh --image_size 384
#
# Finished runs are skipped, interrupted ones resume: call it again after Ctrl-C, or with longer lists. The
# values of a list are separated by blanks. MODEL, PLUGIN, BS, LR and SEED of run_demo.sh are lists of one
# value. TP_SIZE
# and PP_SIZE are flags: --tp_size, --pp_size.
# auto is the published grid; without a GPU, and with MODELS auto, a small one that takes some minutes.

# hub names, folders or presets; auto: google/vit-base-patch16-224 | vit-demo
MODELS=${MODELS:-${MODEL:-auto}}
# hub name, folder, or drawn: synthetic leaf images; auto: AI-Lab-Makerere/beans | drawn
DATASET=${DATASET:-auto}
# flags to compare, separated by bars: "none | --augment | --augment --ema 0.99"
RECIPES=${RECIPES:-none}
# "1/5 2/5 3/5 4/5 5/5": validate on these folds of the training split; none: on the validation split
FOLDS=${FOLDS:-none}
# runs at the same time, each on its own GPU; all: one per GPU; more than GPUs: they share; auto: 1 | up to 4
PARALLEL_RUNS=${PARALLEL_RUNS:-auto}
PLUGINS=${PLUGINS:-${PLUGIN:-auto}}           # names in vit/parallel/plugins.py; auto: gemini | torch_ddp
BATCH_SIZES=${BATCH_SIZES:-${BS:-auto}}       # images per batch and data-parallel rank; auto: 8 16 32 | 16 32
LEARNING_RATES=${LEARNING_RATES:-${LR:-auto}} # peaks; auto: 1e-4 2e-4 5e-4 | 5e-4 1e-3
SEEDS=${SEEDS:-${SEED:-42}}                   # with several, the table has mean and standard deviation
PRESET=${PRESET:-auto}                        # published, fast, cpu; auto: published | by CPU
EPOCH=${EPOCH:-auto}                          # passes over the training images; auto: 5 | 2
WEIGHT_DECAY=${WEIGHT_DECAY:-0.5}             # of the matrices
WARMUP_RATIO=${WARMUP_RATIO:-0.3}             # part of the steps with a rising learning rate
GPUNUM=${GPUNUM:-1}                           # processes of each run, one per GPU
RESULTS=${RESULTS:-./finetuning_results}      # one folder per run, logs, table.md, table.csv and charts

# documents INSTALL and LAUNCHER
. "$(dirname -- "$0")/launcher/launch.sh"

[ -z "${HOSTFILE:-}" ] || die "a sweep runs on one machine: leave HOSTFILE out"
[ -z "${TP_SIZE:-}${PP_SIZE:-}${OUTPUT_PATH:-}" ] ||
  die "TP_SIZE, PP_SIZE and OUTPUT_PATH belong to run_demo.sh:" \
    "add --tp_size 2 --pp_size 2 after the command, and set RESULTS instead of OUTPUT_PATH"
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
