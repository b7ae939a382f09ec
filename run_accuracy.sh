#!/usr/bin/env bash
# Train a Vision Transformer from scratch by a config file. Change a value here, or for one run in front of the
# command; flags are passed on:
#
#   DATA=/path/to/cifar-10-batches-py bash run_accuracy.sh
#   CONFIG=configs/cifar10/vit_lite_7_4_2d.py GPUNUM=4 DATA=... bash run_accuracy.sh --set NUM_EPOCHS=10
#   CONFIG=configs/imagenet/vit_s_16_vanilla.py GPUNUM=8 DATA=/path/to/imagenet bash run_accuracy.sh

CONFIG=${CONFIG:-configs/cifar10/vit_lite_7_4_vanilla.py} # the experiment: model, recipe, form of parallelism
DATA=${DATA:-}                                            # cifar-10-batches-py, an image folder (ImageNet's), what prepare_images.py wrote, parquet, synthetic
OUTPUT_PATH=${OUTPUT_PATH:-auto}                          # the trained model and its report; auto: runs/ and the config's name
GPUNUM=${GPUNUM:-auto}                                    # processes, one a GPU; all: every GPU; auto: 1, or 2 without GPUs

source "$(dirname -- "${BASH_SOURCE[0]}")/launcher/launch.sh" # which documents INSTALL, LAUNCHER, HOSTFILE and the rest

[ -e "$CONFIG" ] || [ ! -e "$HERE/$CONFIG" ] || CONFIG=$HERE/$CONFIG # called from another folder
export DATA

install_environment
launch "$HERE/train.py" \
  --config "$CONFIG" \
  --output_path "$OUTPUT_PATH" \
  "$@"
