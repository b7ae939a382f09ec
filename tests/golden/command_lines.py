"""Command lines of the three programs, and what each says: exit status, stderr, stdout.

    python tests/golden/command_lines.py FOLDER     prints {command line: answer}; fills FOLDER with inputs

One process imports the programs, and forks once for each line, so that none sees what another one has set.
Two messages of tensor_parallel.problems cannot come from a command line (an unknown mode, a model without
gelu): see test_tensor_parallel.py. A folder without the right to write cannot be made where the tests run as
root.
"""

import http.server
import json
import os
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path

import programs
from command_inputs import write_inputs
from forks import in_fork

# In front of every line, but for those with BARE=1.
WORDS = {
    "vit_train_demo.py": "--check --model_name_or_path model --dataset images",
    "train.py": "--check --config configs/cifar10/vit_lite_7_4_vanilla.py",
    "vit_benchmark.py": "--check",
}
ENVIRONMENT = {
    "DATA": "synthetic",
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "COLUMNS": "100",
}
# Not of the environment, but of the machine: GPUS=1 BF16=0 (GPUs, with bf16 units or not), WITHOUT=package,
# HUB=1 (a hub that answers). An empty variable is not set.
MACHINE = ("GPUS", "BF16", "WITHOUT", "HUB", "BARE")

FINETUNE = """
--batch_size 32
--help
--batch_size 0
--batch_size 1.5
--learning_rate 0
--learning_rate nan
--learning_rate inf
--warmup_ratio 1.1
--weight_decay -1
--num_epoch many
--tp_size 0
--validation_fraction 0
--offload_optim_frac 2
--seed 2147483648
--plugin ddp
--precision int8
--preset slow
--keep first
--augmentation
--batch 8
--mixup -1
--layer_decay 0
--drop_path 1
--ema 1
--label_smoothing 1
--image_size 7
--num_workers 65
--auto_augment trivial
--augment --auto_augment all
--fold 6/5
--fold 0/5
--fold 1
--fold 1/101
--push_to_hub beans
--push_to_hub someone/beans
HUB=1 --push_to_hub someone/beans
--plugin hybrid_parallel --pp_size 2 --zero_stage 1 --precision bf16 --layer_decay 0.7 --world_size 4
--plugin hybrid_parallel --tp_size 2 --pp_size 2 --world_size 2
--plugin hybrid_parallel --tp_size 3 --world_size 3
--plugin hybrid_parallel --tp_size 2 --world_size 2 --model_name_or_path vit-tiny-patch16-224
--plugin hybrid_parallel --pp_size 5 --world_size 5
--plugin hybrid_parallel --pp_size 4 --num_microbatches 2 --world_size 4
--plugin hybrid_parallel --pp_size 2 --num_microbatches 3 --world_size 2
--plugin hybrid_parallel --pp_size 2 --batch_size 31 --world_size 2
--plugin torch_ddp_fp16 --precision bf16
--plugin torch_ddp --precision fp16
--plugin gemini --precision fp32
GPUS=1 BF16=0 --plugin low_level_zero --precision bf16
--plugin low_level_zero --zero_stage 0
--plugin low_level_zero --zero_stage 3
--plugin hybrid_parallel --zero_stage 1 --precision fp32 --world_size 2
--plugin gemini --offload_optim_frac 1
--plugin gemini --offload_param_frac 0.5
GPUS=1 --plugin torch_ddp --offload_optim_frac 1
GPUS=1 --plugin low_level_zero --offload_param_frac 0.5
GPUS=1 --plugin hybrid_parallel --offload_optim_frac 1
--placement_policy auto
GPUS=1 --plugin torch_ddp --placement_policy auto
--optimizer hybrid_adam
GPUS=1 --plugin gemini --precision bf16 --optimizer hybrid_adam --max_norm 1 --offload_optim_frac 1
GPUS=1 --plugin gemini
WITHOUT=tensorboard --tensorboard
--plugin gemini --compile
--plugin hybrid_parallel --tp_size 2 --compile --world_size 2
--plugin hybrid_parallel --pp_size 2 --compile --world_size 2
--cuda_graphs
GPUS=1 --plugin torch_ddp --cuda_graphs
GPUS=1 --preset fast --plugin torch_ddp --cuda_graphs --gradient_accumulation_steps 2
GPUS=1 --preset fast --plugin torch_ddp --cuda_graphs --optimizer hybrid_adam
GPUS=1 --preset fast --plugin gemini --cuda_graphs --max_norm 1
GPUS=2 WORLD_SIZE=4 LOCAL_WORLD_SIZE=4 RANK=0
GPUS=2 WORLD_SIZE=4 LOCAL_WORLD_SIZE=4 RANK=3 LOCAL_RANK=3
GPUS=2 WORLD_SIZE=4 LOCAL_WORLD_SIZE=4 RANK=3 LOCAL_RANK=3 TORCHELASTIC_RUN_ID=1
--image_size 18
--image_size 12
--output_path full
--output_path full --resume auto
--output_path full --overwrite_output
--output_path finished
--output_path finished --overwrite_output
--output_path finished --resume auto
--output_path finished --resume full
--output_path begun --resume full
--output_path saved --resume auto
--output_path a_file
--output_path a_file/below
--output_path bare --overwrite_output
--output_path run_of_itself --overwrite_output --model_name_or_path run_of_itself
--resume nowhere
--resume auto --overwrite_output
--model_name_or_path nowhere
--model_name_or_path bare
--model_name_or_path bert
--model_name_or_path full
--model_name_or_path mean --plugin hybrid_parallel
--model_name_or_path someone/model
--model_name_or_path someone/model --dataset someone/images
--model_name_or_path someone/model --image_size 20 --tp_size 5 --plugin hybrid_parallel --world_size 5
--dataset ./nowhere
--dataset a/b/c
--dataset a_file
--dataset full
--dataset empty
--dataset prepared
--dataset prepared_interrupted
--dataset prepared_damaged
--dataset prepared_other_version
--dataset {long}
--output_path {long}
--batch_size 0 --plugin hybrid_parallel --tp_size 3 --precision fp64 --world_size 4
--dataset ./nowhere --image_size 18 --what --model_name_or_path nowhere --resume nowhere
--check --eval_only --output_path full
BARE=1 --check
BARE=1 GPUS=1 --check
"""
TRAIN = """
--set NUM_EPOCHS=1
--help
BARE=1 --check
BARE=1 --check --config configs/none.py --what
BARE=1 --check --config not_python.py
BARE=1 --check --config not_text.py
BARE=1 --check --config divides_by_zero.py
BARE=1 --check --config ends.py
BARE=1 --check --config of_a_wrong_base.py
BARE=1 --check --config wrong_names.py --set SEED=-1 SEEDS=1 --world_size 4
BARE=1 --check --config empty.py
BARE=1 --check --config published.py --world_size 8
DATA= --output_path ./out
DATA=./nowhere
DATA=synthetic:many
DATA=synthetic:0
DATA=someone/images
DATA=cifar
DATA=cifar --set NUM_CLASSES=11
DATA=cifar --set IMG_SIZE=64
DATA=cifar --set RANDOM_RESIZED_CROP=0.3 RANDOM_CROP_PADDING=0
DATA=cifar_incomplete
DATA=cifar_damaged
DATA=images --set NUM_CLASSES=3 IMG_SIZE=16
DATA=images
DATA=half_extracted --set NUM_CLASSES=3
DATA=no_train
DATA=no_classes
DATA=other_classes --set NUM_CLASSES=2
DATA=prepared --set NUM_CLASSES=2
DATA=prepared
DATA=prepared_interrupted
DATA=empty
--set NUM_EPOCHS=0
--set WEIGHT_DECAY=-1 LEARNING_RATE=1e999 DROPOUT=1 RANDOM_FLIP=1 MEAN=(1,2)
--set LOG_PATH=3 parallel=4 POOLING=max NUM_HEADS=True
--set LEARNING_RATE='fast' NUM_EPOCH=3
--set WARMUP_STEPS=100
--set WARMUP_EPOCHS=None
--set TOTAL_BATCH_SIZE=30 gradient_accumulation=4 BATCH_SIZE=None
--set gradient_accumulation=3 BATCH_SIZE=100
--set TOTAL_BATCH_SIZE=30 BATCH_SIZE=None --world_size 4
--set TENSOR_PARALLEL_SIZE=2
--set TENSOR_PARALLEL_MODE=4d
--set TENSOR_PARALLEL_MODE=1d TENSOR_PARALLEL_SIZE=2 parallel={'tensor':{'size':4,'mode':'2d'}} --world_size 4
--set parallel={'data':2,'tensor':{'sides':2}}
--set parallel={'tensor':(2,2)}
--set parallel={'pipeline':0}
--set parallel={'tensor':{'mode':'5d','size':0}}
--set parallel={'tensor':{'mode':'1d','size':2,'depth':2}} --world_size 2
--set parallel={'tensor':{'mode':'2d','size':4,'depth':2}} --world_size 4
--set TENSOR_PARALLEL_MODE=2d TENSOR_PARALLEL_SIZE=8 --world_size 8
--set TENSOR_PARALLEL_MODE=3d TENSOR_PARALLEL_SIZE=4 --world_size 4
--set TENSOR_PARALLEL_MODE=2.5d TENSOR_PARALLEL_SIZE=8 TENSOR_PARALLEL_DEPTH=4 --world_size 8
--set TENSOR_PARALLEL_MODE=2d TENSOR_PARALLEL_SIZE=4 --world_size 6
--set TENSOR_PARALLEL_MODE=2d TENSOR_PARALLEL_SIZE=4 NUM_HEADS=1 HIDDEN_SIZE=198 --world_size 4
--set parallel={'tensor':{'mode':'2d','size':4}} MLP_RATIO=1.01 TOTAL_BATCH_SIZE=3 BATCH_SIZE=3 --world_size 4
--set TENSOR_PARALLEL_MODE=3d TENSOR_PARALLEL_SIZE=8 TOTAL_BATCH_SIZE=2 BATCH_SIZE=2 --world_size 8
--set TENSOR_PARALLEL_MODE=2d TENSOR_PARALLEL_SIZE=4 parallel={'pipeline':2} DROP_PATH=0.1 --world_size 8
--set TENSOR_PARALLEL_MODE=1d TENSOR_PARALLEL_SIZE=3 --world_size 3
--set parallel={'pipeline':8} --world_size 8
--set parallel={'pipeline':2} NUM_MICRO_BATCHES=1 --world_size 2
--set parallel={'pipeline':2} NUM_MICRO_BATCHES=3 --world_size 2
--set IMG_SIZE=30 HIDDEN_SIZE=30
--set MEAN=(0.5,0.5,0.5)
--set MEAN=(0.5,0.5,0.5) STD=(0.5,0,0.5)
--set RAND_AUGMENT=(2,31)
--set RAND_AUGMENT=(2,9)
--set RANDOM_RESIZED_CROP=0.3
--set RANDOM_RESIZED_CROP=0
--set MIX_EPOCHS=3
--set POSITIONS=sincos HIDDEN_SIZE=30 NUM_HEADS=2
--set POSITIONS=sincos INITIAL_WEIGHTS=mimetic HIDDEN_SIZE=30 NUM_HEADS=2
--set POSITIONS=sincos POOLING=mean COMPILE=True TENSOR_PARALLEL_MODE=1d TENSOR_PARALLEL_SIZE=2 --world_size 2
--set CUDA_GRAPHS=True gradient_accumulation=2
GPUS=1 --set CUDA_GRAPHS=True
--set fp16=dict(mode=AMP_TYPE.TORCH) bf16=True
--set fp16={'mode':'int8'}
GPUS=2 WORLD_SIZE=4 LOCAL_WORLD_SIZE=4
BARE=1 --rank 1 --config plain.py
BARE=1 --world_size 2 --rank 2 --local_rank 0 --host 127.0.0.1 --port 29500 --config plain.py
BARE=1 --world_size 2 --rank 1 --local_rank 0 --host two..dots --port 29500 --config plain.py
BARE=1 GPUS=1 --world_size 2 --rank 1 --local_rank 1 --host 127.0.0.1 --port 29500 --config plain.py
--port 70000 --rank -1
--output_path full
--output_path finished --resume auto
--output_path a_file
--output_path finished --overwrite_output --resume auto
"""
BENCHMARK = """
--batch_size 8 16
--help
--plugin gemni --batch_size x --model_name_or_path resnet50
--batch_size 0 8
--num_labels 1 --windows 0 --mem_cap 0 --warmup_steps 0
--plugin hybrid_parallel --tp_size 2 --batch_size 8
--plugin hybrid_parallel --tp_size 3 --pp_size 2 --batch_size 8 9 --world_size 6
--plugin hybrid_parallel --pp_size 2 --batch_size 8 11 --world_size 2
--plugin gemini --precision fp32 --batch_size 8
--plugin none --cuda_graphs --batch_size 8
--plugin none --offload_optim_frac 1 --compile --batch_size 8
--plugin torch_ddp --precision fp16 --image_size 60 --batch_size 8
GPUS=1 --plugin none --batch_size 8
--results a_file/rows.jsonl --batch_size 8 --plugin none --precision bf16
--results damaged.jsonl --batch_size 8
--what
"""


def command_lines() -> list[str]:
    """VARIABLE=VALUE ... PROGRAM WORD ... of every case."""
    found = []
    for program, lines in zip(WORDS, (FINETUNE, TRAIN, BENCHMARK), strict=True):
        for line in lines.strip().splitlines():
            words = line.split(" ")
            at = next((i for i, word in enumerate(words) if not word.partition("=")[0].isupper()), len(words))
            found.append(" ".join([*words[:at], program, *words[at:]]))
    return found


# ---------------------------------------------------------------------------------------------- answers


def be_machine(settings: dict) -> None:
    """Let this process see other hardware, packages or a hub."""
    if gpus := int(settings.get("GPUS", 0)):
        import torch

        from vit import system

        system.count_gpus = torch.cuda.device_count = lambda: gpus
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda *_: (8, 0) if settings.get("BF16") != "0" else (7, 0)
        torch.cuda.get_device_name = lambda *_: "made up"
    import vit.output_checks

    vit.output_checks.room_problem = lambda *_: ""  # whatever else is on this disk
    if package := settings.get("WITHOUT"):
        sys.modules[package] = None
    if settings.get("HUB"):
        handler = type("Quiet", (http.server.BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
        server = http.server.HTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ.update(HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")


def answer(line: str, root: Path) -> dict:
    """What the program says to ``line``, in a fork of this process."""
    words = shlex.split(line.replace("{long}", "x" * 300), posix=False)
    at = next(i for i, word in enumerate(words) if word.endswith(".py") and "=" not in word)
    variables = ENVIRONMENT | dict(word.split("=", 1) for word in words[:at])
    program, argv = words[at], words[at + 1 :]
    if "BARE" not in variables and "--help" not in argv:
        argv = WORDS[program].split() + argv
    out, err = root.parent / "out.txt", root.parent / "err.txt"

    def run() -> None:
        signal.alarm(60)  # a line that is not refused would train
        os.environ.update({name: value for name, value in variables.items() if name not in MACHINE and value})
        if not variables["DATA"]:
            os.environ.pop("DATA", None)
        be_machine(variables)
        programs.PROGRAMS[program](argv)

    status = in_fork(run, out, err)
    said = {"status": status, "stderr": lines_of(err, root)}
    if "--help" in argv:
        help_lines = [text.strip() for text in lines_of(out, root)]
        options = [
            word.strip(" ,")
            for text in help_lines
            if text.startswith("-")
            for word in text.split()
            if word.startswith("-")
        ]
        return said | {"options": list(dict.fromkeys(options))}
    return said | ({"stdout": lines_of(out, root)} if out.read_text() else {})


def lines_of(path: Path, root: Path) -> list[str]:
    """The text of a file, without what is this machine's."""
    text = path.read_text().replace(str(root), "<folder>").replace("x" * 300, "<300 letters>")
    return text.replace(f" on {socket.gethostname()}: ", " on <host>: ").splitlines()


def main() -> None:
    programs.silence()
    import torch  # noqa: F401 - once, not in each fork

    import train  # noqa: F401
    import vit_benchmark  # noqa: F401
    import vit_train_demo  # noqa: F401

    root = Path(sys.argv[1]).resolve() / "inputs"
    root.mkdir()
    write_inputs(root)
    os.chdir(root)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")] + [
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
    ]:
        os.environ.pop(name, None)
    answers = {}
    for line in command_lines():
        answers[line] = answer(line, root)
        rows = (
            root / "benchmark_results" / "rows.jsonl"
        )  # of cases that are impossible: the next line shall not know them
        rows.unlink(missing_ok=True)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
