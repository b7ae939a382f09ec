#!/usr/bin/env bash
# Train a Vision Transformer from scratch by a config file. Change a value in this file, or for one run in
# front of the command; flags are passed on to train.py:
#
#   DATA=/path/to/cifar-10-batches-py bash run_accuracy.sh
#   CONFIG=configs/cifar10/vit_lite_7_4_2d.py GPUNUM=4 DATA=... bash run_accuracy.sh --set NUM_EPOCHS=10
#   CONFIG=configs/imagenet/vit_s_16_vanilla.py GPUNUM=8 DATA=/path/to/imagenet bash run_accuracy.sh

# model, recipe and form of parallelism
CONFIG=${CONFIG:-configs/cifar10/vit_lite_7_4_vanilla.py}
# cifar-10-batches-py, an image folder, a folder from prepare_images.py, parquet, synthetic: docs/data.md
DATA=${DATA:-}
OUTPUT_PATH=${OUTPUT_PATH:-auto} # trained model, checkpoints and metrics; auto: runs/<name of the config>
GPUNUM=${GPUNUM:-auto}           # processes, one per GPU; all: every GPU; auto: 1, or 2 without a GPU

# documents INSTALL, LAUNCHER, HOSTFILE and other variables
. "$(dirname -- "$0")/launcher/launch.sh"

[ -e "$CONFIG" ] || [ ! -e "$HERE/$CONFIG" ] || CONFIG=$HERE/$CONFIG # called from another folder
export DATA

install_environment
launch "$HERE/train.py" \
  --config "$CONFIG" \
  --output_path "$OUTPUT_PATH" \
  "$@"
