#!/usr/bin/env bash
# Fine-tune a Vision Transformer. Change a value here, or for one run in front of the command; flags are passed on:
#
#   bash run_demo.sh
#   PLUGIN=low_level_zero BS=16 GPUNUM=all bash run_demo.sh --precision bf16
#
# auto is the default for this machine: the first value with a GPU, the second without.

MODEL=${MODEL:-auto}                       # hub name, folder or preset; auto: google/vit-base-patch16-224 | vit-demo
DATASET=${DATASET:-auto}                   # hub name, image folder or drawn; auto: AI-Lab-Makerere/beans | drawn
OUTPUT_PATH=${OUTPUT_PATH:-./output_model} # the fine-tuned model, its checkpoints and its report
PLUGIN=${PLUGIN:-auto}                     # training strategy, a name in plugins.py; auto: gemini | torch_ddp
PRESET=${PRESET:-auto}                     # precision and memory: published, fast or cpu; auto: published | cpu
TP_SIZE=${TP_SIZE:-1}                      # GPUs that share each layer (tensor parallelism; hybrid_parallel)
PP_SIZE=${PP_SIZE:-1}                      # GPUs that share the stack of layers (pipeline stages; hybrid_parallel)
GPUNUM=${GPUNUM:-auto}                     # processes, one a GPU; all: every GPU; auto: 1 | 2
BS=${BS:-auto}                             # images per step and data-parallel group; auto: 32 | 32
LR=${LR:-auto}                             # peak learning rate; auto: 1e-4 | 5e-4
EPOCH=${EPOCH:-auto}                       # passes over the training images; auto: 3 | 8 (drawn images, from scratch)
WEIGHT_DECAY=${WEIGHT_DECAY:-0.05}         # pull of the weights towards zero
WARMUP_RATIO=${WARMUP_RATIO:-0.3}          # share of the steps over which the learning rate rises
SEED=${SEED:-42}                           # same seed, same run

source "$(dirname -- "${BASH_SOURCE[0]}")/launcher/launch.sh" # which documents INSTALL, LAUNCHER, HOSTFILE and the rest

install_environment
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
  "$@"
