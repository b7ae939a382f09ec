#!/usr/bin/env bash
# Measure again what results/ holds, on a machine with GPUs:
#
#   bash results/scripts/measure.sh                           names the sections
#   bash results/scripts/measure.sh published fast            the benchmark needs no files
#   GPUS=2 bash results/scripts/measure.sh scaling
#   MODEL=/models/vit-tiny-patch16-224 BEANS=/data/beans bash results/scripts/measure.sh plugins grid
#
# It writes to OUT, a folder for each run, in folders named as in results/ (where the rows of all runs of a folder are one
# runs.jsonl). What OUT holds already is skipped.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-runs/results}
MODEL=${MODEL:-google/vit-base-patch16-224}   # the tables here: ImageNet-pretrained ViT-Tiny/16
BEANS=${BEANS:-AI-Lab-Makerere/beans}
ANIMALS=${ANIMALS:-lewtun/dog_food}           # the table here: results/scripts/make_images.py
CIFAR=${CIFAR:-}                              # any form that train.py reads; the table here: 45,000 training, 5,000 validation images
SIDE=${SIDE:-8}                               # fine-tuning runs side by side
FLAGS=${FLAGS:-}                              # of vit_benchmark.py, such as --window_steps 6
ALL="torch_ddp torch_ddp_fp16 low_level_zero gemini hybrid_parallel"
TRIVIAL="--augment --auto_augment trivial --mixup 0.2" # TrivialAugment and mixup, of the fine-tuning recipes
COMPILED="torch_ddp:bf16:compile low_level_zero:bf16:compile hybrid_parallel:bf16:compile none:bf16:compile"

benchmark() { RESULTS=$OUT/${INTO:-benchmark_h200} bash run_benchmark.sh "$@" $FLAGS; }
report() { "${PYTHON:-python}" report.py "$1" "$OUT/$2"; }
finetune() { PARALLEL_RUNS=$SIDE WEIGHT_DECAY=${WEIGHT_DECAY:-0.05} bash run_finetuning.sh "$@"; }

# ---- speed and memory, synthetic images
published() { PRESET=published BATCH_SIZES="8 32" benchmark; }
eager() { PRESET=fast BATCH_SIZES="8 32 64 128 256 1024" PLUGINS="$(printf '%s:auto:eager ' $ALL) none:bf16:eager" benchmark; }
compiled() { PRESET=fast BATCH_SIZES="8 32 64 128 256 1024" PLUGINS="$COMPILED" benchmark; }
fast() { PRESET=fast BATCH_SIZES="8 32 256" PLUGINS="$ALL none:bf16" benchmark; } # CUDA graphs, compiled, where it can be
peers() { INTO=benchmark_peers PRESET=fast BATCH_SIZES="8 32 256" PLUGINS="low_level_zero hybrid_parallel gemini torch_ddp none:bf16" benchmark --peers; }
size384() { PRESET=fast MODEL=google/vit-base-patch16-384 BATCH_SIZES="32 128" PLUGINS="$ALL none:bf16 none:bf16:compile" benchmark; }
vit_large() { PRESET=fast MODEL=google/vit-large-patch16-224 BATCH_SIZES=128 PLUGINS="$ALL none:bf16 none:bf16:compile" benchmark; }
scaling() { # GPUS=2, GPUS=4
  local gpus=${GPUS:-4}
  export GPUNUM=$gpus PRESET=fast
  PLUGINS="$ALL none:bf16" BATCH_SIZES=256 benchmark
  export PLUGINS=hybrid_parallel BATCH_SIZES=$((256 * gpus)) # as many images a GPU
  TP_SIZE=$gpus benchmark
  PP_SIZE=$gpus benchmark --num_microbatches $((4 * gpus))
  [ "$gpus" != 4 ] || TP_SIZE=2 PP_SIZE=2 benchmark --num_microbatches 8
}

files() { # fine-tuning from JPEG files of about 500 x 375 px, and the same steps on synthetic images; IMAGES: how many are drawn
  local images=$OUT/jpeg_files
  if [ ! -d "$images" ]; then # complete, or not there
    "${PYTHON:-python}" results/scripts/imagenet_shape.py "$images.partial" --classes 3 --train "${IMAGES:-42000}" --val 3000
    mv "$images.partial" "$images"
  fi
  export PRESET=fast
  [ -e "$OUT/files/report.html" ] ||
    MODEL=vit-base-patch16-224 DATASET=$images PLUGIN=low_level_zero BS=256 EPOCH=4 OUTPUT_PATH=$OUT/files bash run_demo.sh --compile --overwrite_output
  INTO=files_synthetic PLUGINS=low_level_zero BATCH_SIZES=256 benchmark
}

# ---- accuracy on Beans
plugins() { # three seeds of the published setting at two sizes
  local size
  for size in 224 384; do
    RESULTS=$OUT/beans_plugins/${size}_px DATASET=$BEANS PLUGINS=$ALL BS=32 LR=1e-4 EPOCH=3 SEEDS="42 43 44" finetune --image_size $size
  done
  report sweep beans_plugins
}
layouts() { # four GPUs: the same training by every form of parallelism; 6 heads, random initial weights
  local run=(finetune --precision fp32 --no-scale_lr)
  export RESULTS=$OUT/beans_layouts PLUGINS=hybrid_parallel MODELS=vit-small-patch16-224 DATASET=$BEANS PRESET=fast
  export LR=1e-4 EPOCH=3 SEEDS="42 43 44" SIDE=3
  GPUNUM=1 BS=32 "${run[@]}"
  GPUNUM=2 BS=16 "${run[@]}"
  GPUNUM=2 BS=32 "${run[@]}" --tp_size 2
  GPUNUM=4 BS=32 "${run[@]}" --tp_size 2 --pp_size 2
}
grid() { RESULTS=$OUT/beans_grid DATASET=$BEANS WEIGHT_DECAY=0.5 finetune; }
recipe() { # which flags help, by five folds of the training split
  export FOLDS="1/5 2/5 3/5 4/5 5/5" DATASET=$BEANS PLUGINS=torch_ddp PRESET=fast BS=32
  RESULTS=$OUT/beans_folds/10_epochs LR=1e-4 EPOCH=10 RECIPES="none | --augment | --augment --auto_augment trivial | --augment --layer_decay 0.75
    | --augment --label_smoothing 0.1 | --augment --mixup 0.2 | --augment --cutmix 1 | --augment --drop_path 0.1 | --augment --ema 0.98" finetune
  RESULTS=$OUT/beans_folds/20_epochs LEARNING_RATES="1e-4 2e-4" EPOCH=20 RECIPES="$TRIVIAL | --augment --mixup 0.2 | $TRIVIAL --image_size 384" finetune
  RESULTS=$OUT/beans_folds/40_epochs LR=2e-4 EPOCH=40 RECIPES="$TRIVIAL --image_size 384 | $TRIVIAL --image_size 384 --ema 0.99" finetune
  report sweep beans_folds
}
chosen() { # the best of them, and the published setting: validation and test
  export DATASET=$BEANS PLUGINS=torch_ddp BS=32 SEEDS="42 43 44 45 46"
  RESULTS=$OUT/beans_final/published_3_epochs LR=1e-4 EPOCH=3 finetune
  RESULTS=$OUT/beans_final/20_epochs LR=2e-4 EPOCH=20 PRESET=fast RECIPES="$TRIVIAL --image_size 384" finetune
  RESULTS=$OUT/beans_final/40_epochs LR=2e-4 EPOCH=40 PRESET=fast RECIPES="$TRIVIAL --image_size 384 --ema 0.99 --keep last" finetune
  report sweep beans_final
}
animals() { RESULTS=$OUT/three_animals DATASET=$ANIMALS PLUGINS=gemini BS=32 LR=1e-4 EPOCH=10 finetune; }

# ---- from scratch
scratch() { # CONFIG NAME "NAME=VALUE ..." SEED...: one after the other, for the time counts
  local config=$1 name=$2 values=$3 seed
  shift 3
  for seed; do
    DATA=$CIFAR CONFIG=configs/cifar10/$config.py bash run_accuracy.sh --set SEED=$seed $values --output_path "$OUT/cifar10/recipes/${name}_seed$seed"
  done
  report accuracy cifar10
}
cifar() { scratch vit_lite_7_4_vanilla vanilla "" 42 43 44; }
cifar_published() { scratch vit_lite_7_4_vanilla published "DROPOUT=0.1 DROP_PATH=0 INITIAL_WEIGHTS=usual" 42 43 44; }
cifar_fast() { scratch vit_lite_7_4_fast fast "" 42 43 44; }
cifar_best() { scratch vit_lite_7_4_best best "" 42 43 44; }
cifar_optimizers() { # 60 epochs without CutMix
  local short="NUM_EPOCHS=60 CUTMIX=0 MIX_EPOCHS=None" rate
  scratch vit_lite_7_4_fast adamw_2e-3 "$short OPTIMIZER=adamw LEARNING_RATE=2e-3 WEIGHT_DECAY=0.03" 42
  for rate in 1e-3 2e-3 4e-3 8e-3; do scratch vit_lite_7_4_fast muon_$rate "$short LEARNING_RATE=$rate WEIGHT_DECAY=0.1" 42; done
  for rate in 2e-3 4e-3; do scratch vit_lite_7_4_fast muon_${rate}_decay_0.3 "$short LEARNING_RATE=$rate" 42; done
}
imagenet_forms() { # the forms of parallelism of the ImageNet configs, also on a CPU; dropout differs between forms, so there is none
  local form
  for form in vanilla:1 1d:2 2d:4 2p5d:4 3d:8; do
    DATA=synthetic:64 CONFIG=configs/imagenet/vit_s_16_${form%:*}.py GPUNUM=${form#*:} bash run_accuracy.sh --output_path "$OUT/imagenet_forms/${form%:*}" \
      --set fp16=None DROPOUT=0 TOTAL_BATCH_SIZE=16 NUM_EPOCHS=5 WARMUP_EPOCHS=1
  done
}

[ $# -gt 0 ] || { grep -oE '^[a-z0-9_]+\(\)' "${BASH_SOURCE[0]}" | tr -d '()' | grep -vxE 'benchmark|report|finetune|scratch' | paste -sd' '; exit 2; }
export MODELS=$MODEL
for section in "$@"; do
  [[ $(type -t "$section") = function ]] || { echo "there is no section $section" >&2; exit 2; }
  (
    case $section in published | eager | compiled | fast | peers | size384 | vit_large | scaling | files) unset MODEL MODELS ;; esac # ViT-B/16 by its name, random weights
    "$section"
  )
done
