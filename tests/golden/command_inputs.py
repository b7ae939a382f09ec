"""The files that the command lines of command_lines.py name."""

import json
import pickle
from pathlib import Path

import numpy as np
import programs
from safetensors.numpy import save_file

PUBLISHED = """
from colossalai.amp import AMP_TYPE
TOTAL_BATCH_SIZE = 4096
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.3
TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = '2d'
NUM_EPOCHS = 300
WARMUP_EPOCHS = 32
parallel = dict(pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE))
fp16 = dict(mode=AMP_TYPE.TORCH, )
gradient_accumulation = 2
BATCH_SIZE = TOTAL_BATCH_SIZE // gradient_accumulation
clip_grad_norm = 1.0
LOG_PATH = f"./vit_{TENSOR_PARALLEL_MODE}_bs{BATCH_SIZE}_{fp16['mode']}/"
"""
PLAIN = """
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
NUM_EPOCHS = 2
WARMUP_EPOCHS = 1
TOTAL_BATCH_SIZE = 8
"""
WRONG_NAMES = """
NUM_EPOCH = 3
LEARNING_RATE = 'fast'
WARMUP_EPOCHS = 9
TOTAL_BATCH_SIZE = 30
HIDDEN_SIZE = 30
NUM_HEADS = 4
NUM_EPOCHS = 5
strange = 4
_helper = 5
"""
CONFIGS = {
    "not_python.py": "a: 1\nb: [",
    "divides_by_zero.py": "A = 1\nB = 1 / 0",
    "ends.py": "A = 1\nraise SystemExit(0)",
    "of_a_wrong_base.py": "from divides_by_zero import *",
    "wrong_names.py": WRONG_NAMES,
    "empty.py": "",
    "plain.py": PLAIN,
    "published.py": PUBLISHED,
}


def write_inputs(root: Path) -> None:
    """What the lines name: model and data folders that are whole and that are not, runs, configs."""

    def write(path: str, text: str = "") -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    def images(name: str, *folders: str) -> None:
        for folder in folders:
            write(f"{name}/{folder}/1.png")

    (root / "configs").symlink_to(programs.ROOT / "configs")
    vit = {"model_type": "vit", "num_attention_heads": 4, "num_hidden_layers": 4, "patch_size": 4}
    for name, config in {
        "model": vit,
        "run_of_itself": vit,
        "bert": {"model_type": "bert"},
        "mean": {"model_type": "ijepa"},
    }.items():
        write(f"{name}/config.json", json.dumps(config))
        write(f"{name}/preprocessor_config.json", "{}")
        # the names of a ViT's layers, which are read before a launch, with one number each
        names = [
            f"encoder.layer.{i}.layernorm_before.bias" for i in range(config.get("num_hidden_layers", 12))
        ]
        save_file(dict.fromkeys(names, np.zeros(1, np.float32)), root / name / "model.safetensors")
    write("bare/config.json", json.dumps(vit))
    write("full/something")
    write("a_file")
    (root / "empty").mkdir()
    images(
        "images",
        *(
            f"{split}/{name}"
            for split in ("train", "validation", "test")
            for name in ("blue", "green", "red")
        ),
    )
    images("half_extracted", "train/blue", "train/green", "train/red", "val/blue")
    images("no_train", "val/blue", "test/blue")
    images("no_classes", "val/blue")
    (root / "no_classes" / "train").mkdir()
    images("other_classes", "train/blue", "train/green", "val/blue", "val/yellow")
    about = {"version": 1, "complete": True, "labels": ["blue", "green"], "splits": {}, "format": "raw"}
    write("prepared/prepared.json", json.dumps(about))
    write("prepared_interrupted/prepared.json", json.dumps(about | {"complete": False}))
    write("prepared_other_version/prepared.json", json.dumps(about | {"version": 0}))
    write("prepared_damaged/prepared.json", "{")
    meta = pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]}, protocol=2)
    for name in ("cifar", "cifar_incomplete", "cifar_damaged"):
        for i in range(1, 6):
            write(f"{name}/cifar-10-batches-py/data_batch_{i}")
        (root / name / "cifar-10-batches-py" / "batches.meta").write_bytes(
            meta[: 20 if "damaged" in name else None]
        )
    (root / "cifar_incomplete" / "cifar-10-batches-py" / "data_batch_2").unlink()
    write("finished/metrics.jsonl", '{"kind": "run"}\n{"kind": "end", "seconds": 1.0}\n')
    write("run_of_itself/metrics.jsonl", '{"kind": "run"}\n{"kind": "end", "seconds": 1.0}\n')
    write("begun/metrics.jsonl", '{"kind": "run"}\n{"kind": "epoch"}\n')
    write("saved/metrics.jsonl", '{"kind": "run"}\n')
    write("saved/checkpoints/00001_epoch_1_image_0/meta.json", "{}")
    write("damaged.jsonl", '{"kind": "case"}\n{"kind"\n')
    for name, text in CONFIGS.items():
        write(name, text)
    (root / "not_text.py").write_bytes(b"A = '\xff'\n")
