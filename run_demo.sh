#!/usr/bin/env bash
# Fine-tune a Vision Transformer. Change a value in this file, or for one run in front of the command; flags
# are passed on to vit_train_demo.py:
#
#   bash run_demo.sh
#   PLUGIN=low_level_zero BS=16 GPUNUM=all bash run_demo.sh --precision bf16
#
# auto is the default of this machine: the first value with a GPU, the second without.

# best: what was best on Beans, for a pretrained model on a GPU; values that you set stay. docs/fine_tuning.md
RECIPE=${RECIPE:-none}
RECIPE_FLAGS=
if [ "$RECIPE" = best ]; then
  : "${PLUGIN:=torch_ddp}" "${PRESET:=fast}" "${LR:=2e-4}" "${EPOCH:=20}"
  RECIPE_FLAGS="--augment --auto_augment trivial --mixup 0.2 --image_size 384"
fi

# hub name, folder or preset; auto: google/vit-base-patch16-224 | vit-demo
MODEL=${MODEL:-auto}
# hub name, folder, or drawn: synthetic leaf images; auto: AI-Lab-Makerere/beans | drawn
DATASET=${DATASET:-auto}
OUTPUT_PATH=${OUTPUT_PATH:-./output_model} # fine-tuned model, checkpoints and metrics
PLUGIN=${PLUGIN:-auto}                     # a name in vit/parallel/plugins.py; auto: gemini | torch_ddp
PRESET=${PRESET:-auto}                     # precision, memory: published, fast, cpu; auto: published | by CPU
TP_SIZE=${TP_SIZE:-1}                      # tensor-parallel size: GPUs that share each layer; hybrid_parallel
PP_SIZE=${PP_SIZE:-1}                      # pipeline size: GPUs that share the layers; hybrid_parallel
GPUNUM=${GPUNUM:-auto}                     # processes, one per GPU; all: every GPU; auto: 1 | 2
BS=${BS:-auto}                             # images per batch and data-parallel rank; auto: 32 | 32
LR=${LR:-auto}                             # peak learning rate; auto: 1e-4 | 1e-3 (vit-demo)
EPOCH=${EPOCH:-auto}                       # passes over the training images; auto: 3 | 5 (vit-demo)
WEIGHT_DECAY=${WEIGHT_DECAY:-0.05}         # of the matrices
WARMUP_RATIO=${WARMUP_RATIO:-0.3}          # part of the steps with a rising learning rate
SEED=${SEED:-42}                           # same seed, same run

# documents INSTALL, LAUNCHER, HOSTFILE and other variables
. "$(dirname -- "$0")/launcher/launch.sh"

[ "$RECIPE" = none ] || [ "$RECIPE" = best ] || die "RECIPE=$RECIPE: must be none or best"
install_environment
# shellcheck disable=SC2086
launch "$HERE/vit_train_demo.py" \
  --model_name_or_path "$MODEL" \
  --dataset "$DATASET" \
  --output_path "$OUTPUT_PATH" \
  --plugin "$PLUGIN" \
  --preset "$PRESET" \
  --tp_size "$TP_SIZE" \
  --pp_size "$PP_SIZE" \
  --batch_size "$BS" \
  --learning_rate "$LR" \
  --num_epoch "$EPOCH" \
  --weight_decay "$WEIGHT_DECAY" \
  --warmup_ratio "$WARMUP_RATIO" \
  --seed "$SEED" \
  $RECIPE_FLAGS "$@"
