#!/usr/bin/env bash
# Images/s of training ViT-S/16 on a set of ImageNet's shape, on a machine with GPUs: synthetic tensors, prepared data, and
# plain JPEG files.
#
#   bash results/scripts/measure_imagenet.sh
#   RUNS="vit_s_16_better_baseline/synthetic vit_s_16_better_baseline/prepared_raw" bash results/scripts/measure_imagenet.sh
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/results/imagenet_speed}
SETS=${SETS:-runs/imagenet_shape}   # the generated images: 3 GB
GPUS=${GPUS:-1}
PROCESSES=${PROCESSES:-$(nproc)}
SECONDS_ALLOWED=${SECONDS_ALLOWED:-60}
mkdir -p "$OUT" "$SETS"
df -h /dev/shm | tail -1  # batches of 154 MB, two for each worker: 5 GB
export PROGRESS=0 OMP_NUM_THREADS=1

# ---- a set of ImageNet's shape, in at most a minute: 1,000 classes, 6,000 + 1,000 images drawn; then each training image is
# linked under many names, so that an epoch is long enough. A link is read and decoded as a file of its own (the page cache
# holds them all, as a machine with more memory than the set would; a disk is not measured).
if [ ! -d "$SETS/tree/val" ]; then
  time timeout "$SECONDS_ALLOWED" "$PYTHON" results/scripts/imagenet_shape.py "$SETS/drawn" --classes 1000 --train 6000 --val 1000 --processes "$PROCESSES" || exit 1
  "$PYTHON" - "$SETS" <<'PY'
import os, sys
from pathlib import Path
sets = Path(sys.argv[1])
for folder in sorted((sets / "drawn" / "train").iterdir()):
    there = sets / "tree" / "train" / folder.name
    there.mkdir(parents=True)
    for path in folder.iterdir():
        for k in range(35):  # 210,000 images: above MAX_CACHED_TRAIN_IMAGES of vit/data/decode.py, so that nothing is kept in memory
            os.link(path, there / f"{path.stem}_{k}.JPEG")
os.rename(sets / "drawn" / "val", sets / "tree" / "val")
PY
fi

# ---- prepared: 210,000 images take 35 times the drawn ones' space, about 55 GB raw; so prepare the drawn ones once and
# repeat their index
if [ ! -d "$SETS/prepared" ]; then
  mkdir -p "$SETS/drawn/val" && cp -al "$SETS/tree/val/." "$SETS/drawn/val/"
  for format in raw jpeg; do
    time "$PYTHON" prepare_images.py "$SETS/drawn" "$SETS/prepared_$format" --size 256 --format $format --processes "$PROCESSES" | tee "$OUT/prepare_$format.log"
    "$PYTHON" - "$SETS/prepared_$format" <<'PY'
import sys
from pathlib import Path
import numpy as np
path = Path(sys.argv[1]) / "train.npz"
index = dict(np.load(path))
np.savez(path, **{name: np.tile(column, 35) for name, column in index.items()})
PY
  done
  mkdir -p "$SETS/prepared"
fi

# ---- decoding alone, per core: what the loader could give
[ -s "$OUT/loader.txt" ] || "$PYTHON" - "$SETS" > "$OUT/loader.txt" <<'PY'
import sys, time
sys.path.insert(0, ".")
import torch
from data import read_splits
from vit.data.loaders import BatchDataset
from vit.data.transforms import RandomResizedCrop, ResizeCenterCrop
for name in ("tree", "prepared_raw", "prepared_jpeg"):
    started = time.perf_counter()
    train = read_splits(f"{sys.argv[1]}/{name}")[0]["train"]
    listed = time.perf_counter() - started
    read = BatchDataset(train, ResizeCenterCrop(224, 256), RandomResizedCrop(224, 0, smallest_crop=0.05))
    order = torch.randperm(len(read)).tolist()
    read.__getitems__([(0, i) for i in order[:500]])
    rates = []
    for k in range(5):
        started = time.perf_counter()
        read.__getitems__([(0, i) for i in order[500 + 500 * k : 1000 + 500 * k]])
        rates.append(500 / (time.perf_counter() - started))
    print(name, f"listed in {listed:.1f} s; images/s of one core:", *(f"{rate:.0f}" for rate in sorted(rates)), flush=True)
PY
cat "$OUT/loader.txt"

run() { # name DATA overrides...
  local name=$1 data=$2
  shift 2
  [[ " ${RUNS:-$CONFIG/$name} " == *" $CONFIG/$name "* ]] || return 0 # RUNS="vit_s_16_vanilla/synthetic ..." for some of them
  DATA=$data "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" train.py \
    --config configs/imagenet/$CONFIG.py --output_path "$OUT/$CONFIG/$name" --overwrite_output --set CHECKPOINT_EPOCHS=100 \
    NUM_EPOCHS=2 "$@" > "$OUT/$CONFIG-$name.log" 2>&1
  echo "$CONFIG $name: exit $?"
  grep -E "Evaluation|error|note" "$OUT/$CONFIG-$name.log"
  rm -rf "$OUT/$CONFIG/$name/checkpoints" "$OUT/$CONFIG/$name/model.safetensors"
}

# the second epoch's images/s is the figure: the first compiles
FAST="bf16=True COMPILE=True"
CONFIG=vit_s_16_better_baseline
run synthetic synthetic:105000 $FAST TOTAL_BATCH_SIZE=$((1024 * GPUS)) WARMUP_STEPS=100
run prepared_raw "$SETS/prepared_raw" $FAST TOTAL_BATCH_SIZE=$((1024 * GPUS)) WARMUP_STEPS=100
run prepared_jpeg "$SETS/prepared_jpeg" $FAST TOTAL_BATCH_SIZE=$((1024 * GPUS)) WARMUP_STEPS=100
run tree "$SETS/tree" $FAST TOTAL_BATCH_SIZE=$((1024 * GPUS)) WARMUP_STEPS=100
CONFIG=vit_s_16_vanilla # the fast form; and fp16, as published
run synthetic synthetic:105000 $FAST fp16=None WARMUP_EPOCHS=1
run prepared_raw "$SETS/prepared_raw" $FAST fp16=None WARMUP_EPOCHS=1
run synthetic_published synthetic:105000 WARMUP_EPOCHS=1
CONFIG=vit_s_16_better_baseline
run synthetic_plain synthetic:105000 $FAST RAND_AUGMENT=None MIXUP=0 TOTAL_BATCH_SIZE=$((1024 * GPUS)) WARMUP_STEPS=100 # what RandAugment and mixup cost

"$PYTHON" - "$OUT" <<'PY'
import json, sys
from pathlib import Path
sys.path.insert(0, ".")
from vit.report.reading import read_runs
from vit.report.tables import markdown_table
out, body, notes = Path(sys.argv[1]), [], {}
DATA = {"synthetic": "synthetic", "synthetic_plain": "synthetic, without RandAugment and mixup", "synthetic_published": "synthetic, fp16",
        "prepared_raw": "prepared, raw", "prepared_jpeg": "prepared, JPEG", "tree": "JPEG files"}  # fmt: skip
found = {(run["section"], run["name"]): run for run in read_runs(out) if run["status"] == "finished"}
for (config, name), run in sorted(found.items(), key=lambda item: (item[0][0], list(DATA).index(item[0][1]))):
    about, last = run["environment"], run["epochs"][-1]
    rate, alone = last["images_per_second"], found.get((config, "synthetic"))
    share = f"{rate / alone['epochs'][-1]['images_per_second']:.1%}" if alone else ""
    gpus = int(about["hardware"].split()[0])
    hours = [f"{epochs * 1_281_167 / (8 * rate / gpus) / 3600:.1f} h" for epochs in (90, 300)]
    body.append([config, DATA[name], f"{rate:.0f}", share, f"{last['peak_memory_gib']:.1f}", *hours])
    notes[f"{about['date'][:10]} on {about['hardware']}; {', '.join(f'{n} {v}' for n, v in about['versions'].items())}"] = None
    notes[f"    DATA={run['settings']['dataset']} {about['command']}"] = None
header = ["config", "data", "images/s", "of synthetic", "peak GiB", "90 epochs", "300 epochs"]
text = ["# Speed of training ViT-S/16", markdown_table(header, body),
        "images/s is the second epoch's (the first one compiles) on a generated set of ImageNet's shape, whose files are in memory. "
        "The hours are an **extrapolation** to ImageNet's 1,281,167 images on eight such GPUs, training alone; nothing of that length was run.",
        "Made by `bash results/scripts/measure_imagenet.sh`; the commands it ran:", "\n".join(notes)]  # fmt: skip
(out / "table.md").write_text("\n\n".join(text) + "\n")
print("\n\n".join(text[:2]))
PY
find "$OUT" -mindepth 3 -type f ! -name metrics.jsonl -delete
