"""vit/config.py and vit/config_settings.py: what a config file may hold, and what is wrong with one."""

import ast
from pathlib import Path

import pytest
from helpers import check_vit_s_16
from train_cases import CIFAR10_CONFIGS as CONFIGS
from train_cases import problems_of

from vit.config import AMP_TYPE, ConfigError, load_config, parse_overrides
from vit.config_settings import config_problems, to_settings, vit_config
from vit.layout import ParallelLayout
from vit.system import Machine

(VANILLA,) = (path for path in CONFIGS if path.stem.endswith("_vanilla"))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


PUBLISHED = """
from colossalai.amp import AMP_TYPE

TOTAL_BATCH_SIZE = 4096
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.3

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = '1d'

NUM_EPOCHS = 300
WARMUP_EPOCHS = 32

parallel = dict(
    pipeline=1,
    tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE),
)

fp16 = dict(mode=AMP_TYPE.TORCH, )

gradient_accumulation = 2

BATCH_SIZE = TOTAL_BATCH_SIZE // gradient_accumulation

clip_grad_norm = 1.0

LOG_PATH = f"./vit_{TENSOR_PARALLEL_MODE}_bs{BATCH_SIZE}_{fp16['mode']}/"
"""


def test_published_imagenet_config_loads_as_it_stands(tmp_path):
    path = write(tmp_path / "vit_1d.py", PUBLISHED.replace("'1d'", "'2d'"))
    config, problems = load_config(path, ["TOTAL_BATCH_SIZE=1024"])
    assert problems + config_problems(config, 8, Machine()) == []
    assert (config["BATCH_SIZE"], config["precision"], config["mode"], config["tp"]) == (512, "fp16", "2d", 4)
    assert config["LOG_PATH"] == "./vit_2d_bs512_AMP_TYPE.TORCH/"
    check_vit_s_16(vit_config(config))


def test_published_one_with_heads_that_tensor_parallelism_cannot_cut_is_refused(tmp_path):
    (message,) = problems_of(write(tmp_path / "vit_1d.py", PUBLISHED))
    assert message.startswith("NUM_HEADS 6: is no multiple of the tensor parallel size 4")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_this_repository_fit_and_have_a_card(path):
    assert problems_of(path, world=8) == []
    config, _ = load_config(str(path))
    recipes = {"fast": (120, 3e-3, "muon"), "best": (400, 3e-3, "muon")}
    recipe = recipes.get(path.stem.split("_")[-1], (200, 2e-3, "adamw"))
    assert (config["NUM_EPOCHS"], config["LEARNING_RATE"], config["OPTIMIZER"]) == recipe
    assert config["TOTAL_BATCH_SIZE"] == 512
    assert all(
        word in ast.get_docstring(ast.parse(path.read_text())) for word in ("Command", "Measured", path.stem)
    )


A100, T4, CPU = Machine(1, has_bf16=True), Machine(1), Machine(has_bf16=True)


@pytest.mark.parametrize(
    "overrides, machine, precision, graphs, compiles",
    [
        ([], A100, "bf16", True, True),
        ([], T4, "fp32", True, True),
        ([], CPU, "fp32", False, False),
        (["bf16=False", "CUDA_GRAPHS=False"], A100, "fp32", False, False),
        (["CUDA_GRAPHS=True", "bf16=False"], A100, "fp32", True, True),
        # a step in fp16, or of several batches, cannot be recorded
        (["fp16={'mode': 'torch'}"], A100, "fp16", False, False),
        (["gradient_accumulation=2"], A100, "bf16", False, False),
        (["gradient_accumulation=2", "COMPILE=True"], A100, "bf16", False, True),
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4"], A100, "bf16", False, False),
    ],
)
def test_auto_is_what_the_machine_and_the_form_can_do(
    overrides, machine, precision, graphs, compiles, monkeypatch
):
    monkeypatch.setattr("vit.config_settings.why_no_compiler", lambda: "")
    config, problems = load_config(str(VANILLA), overrides)
    assert problems + config_problems(config, config["TENSOR_PARALLEL_SIZE"] or 1, machine) == []
    settings = to_settings(config, str(VANILLA), ParallelLayout(1), dataset="synthetic")
    assert (settings.precision, settings.cuda_graphs, settings.compile) == (precision, graphs, compiles)
    assert not settings.notes


@pytest.mark.parametrize(
    "overrides, processes, plugin, recorded",
    [
        ([], 1, "hybrid_parallel", "hybrid_parallel"),
        (["PLUGIN=torch_ddp"], 1, "torch_ddp", "torch_ddp"),
        (["PLUGIN=torch_ddp", "bf16=False", "fp16={'mode': 'torch'}"], 1, "torch_ddp_fp16", "torch_ddp"),
        (["parallel={'pipeline': 2}"], 2, "hybrid_parallel", "torch_ddp"),
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4"], 4, "2d", "torch_ddp"),
    ],
)
def test_plugin_of_a_config_is_of_data_parallelism_alone(overrides, processes, plugin, recorded):
    config, problems = load_config(str(VANILLA), overrides)
    assert problems + config_problems(config, processes, Machine()) == []
    settings = to_settings(config, str(VANILLA), ParallelLayout(1), dataset="synthetic")
    # another form inherits it, but its runs of before it came go on
    assert (settings.plugin, settings.config["record"]["PLUGIN"]) == (plugin, recorded)


def test_without_a_compiler_auto_records_what_is_not_compiled_and_says_why(monkeypatch):
    monkeypatch.setattr("vit.config_settings.why_no_compiler", lambda: "triton is not installed")
    config, _ = load_config(str(VANILLA))
    assert config_problems(config, 1, A100) == []
    settings = to_settings(config, str(VANILLA), ParallelLayout(1), dataset="synthetic")
    assert settings.cuda_graphs and not settings.compile
    assert settings.notes == ("nothing is compiled: triton is not installed",)


def test_every_problem_is_named_at_once(tmp_path):
    text = (
        "NUM_EPOCH = 3\nLEARNING_RATE = 'fast'\nWARMUP_EPOCHS = 9\nTOTAL_BATCH_SIZE = "
        "30\nHIDDEN_SIZE = 30\nNUM_HEADS = 4\nNUM_EPOCHS = 5\n"
    )
    found = problems_of(write(tmp_path / "a.py", text), "SEED=-1", "SEEDS=1")
    for part in (
        "NUM_EPOCH = 3",
        "did you mean NUM_EPOCHS",
        "LEARNING_RATE = 'fast'",
        "WEIGHT_DECAY is missing",
        "SEED = -1",
        "--set SEEDS=1",
        "no multiple of NUM_HEADS",
        "BATCH_SIZE 30: is no multiple of the 4",
    ):
        assert any(part in message for message in found), (part, found)


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (["TENSOR_PARALLEL_SIZE=6"], 1, ["1 process(es)", "must be a square"]),
        (
            ["fp16={'mode': 'torch'}", "bf16=True", "IMG_SIZE=30", "parallel={'pipeline': 0}"],
            4,
            ["give one of them", "PATCH_SIZE 4", "pipeline 0: must be"],
        ),
        (
            ["gradient_accumulation=3", "BATCH_SIZE=100", "HIDDEN_SIZE=30", "INITIAL_WEIGHTS=usual"],
            6,
            ["TOTAL_BATCH_SIZE 512", "NUM_HEADS 4", "6 process(es)", "hidden size 30"],
        ),
    ],
)
def test_one_problem_hides_no_other(overrides, world, said):
    (path,) = (path for path in CONFIGS if path.stem.endswith("_2d"))
    found = problems_of(path, *overrides, world=world)
    assert len(found) == len(said) and all(any(part in message for message in found) for part in said), found


def test_lists_and_imported_functions_are_taken(tmp_path):
    path = write(
        tmp_path / "own.py",
        CONFIGS[-1].read_text()
        + "\nfrom math import sqrt\nLEARNING_RATE = sqrt(4e-6)\nMEAN = STD = [0.5, 0.5, 0.5]\n",
    )
    config, problems = load_config(path)
    assert problems + config_problems(config, 1, Machine()) == [] and config[
        "LEARNING_RATE"
    ] == pytest.approx(2e-3)
    assert hash((config["MEAN"], config["STD"]))  # Normalize keeps them by it


def test_values_on_the_command_line_are_expressions_as_in_a_config():
    values, problems = parse_overrides(
        [
            "parallel=dict(pipeline=2, tensor=dict(mode='1d', size=2))",
            "LEARNING_RATE=1e-3*2",
            "AUTO_AUGMENT=cifar10",
            "LOG_PATH=./runs/a-1",
            "fp16=dict(mode=AMP_TYPE.TORCH)",
            "seed=7",
        ]
    )
    assert (
        problems == []
        and values["parallel"] == {"pipeline": 2, "tensor": {"mode": "1d", "size": 2}}
        and values["SEED"] == 7
    )
    assert (values["LEARNING_RATE"], values["AUTO_AUGMENT"], values["LOG_PATH"]) == (
        2e-3,
        "cifar10",
        "./runs/a-1",
    )
    assert values["fp16"] == {"mode": AMP_TYPE.TORCH}


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=8"], 8, "must be a square"),
        (["TENSOR_PARALLEL_MODE=3d", "TENSOR_PARALLEL_SIZE=4"], 4, "must be a cube"),
        (
            ["TENSOR_PARALLEL_MODE=2.5d", "TENSOR_PARALLEL_SIZE=8", "TENSOR_PARALLEL_DEPTH=4"],
            8,
            "depth x a square",
        ),
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4"], 6, "6 process(es)"),
        (["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4", "NUM_HEADS=1"], 4, "number of heads 1"),
        (
            ["TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4", "parallel={'pipeline': 2}"],
            8,
            "goes with 1d and vanilla",
        ),
        (["TENSOR_PARALLEL_MODE=4d"], 4, "must be one of"),
        (["LEARNING_RATE=1e999"], 4, "must be a number > 0"),
        (["TENSOR_PARALLEL_SIZE=2"], 4, "needs a mode"),
        (["parallel={'data': 2}"], 4, "data parallelism follows"),
        (["gradient_accumulation=3", "BATCH_SIZE=100"], 4, "TOTAL_BATCH_SIZE 512"),
        (["fp16={'mode': 'torch'}", "bf16=True"], 4, "give one of them"),
        (["fp16={'mode': 'int8'}"], 4, "AMP_TYPE.TORCH"),
        (["parallel={'pipeline': 8}"], 8, "more stages than the 7 layers"),
        (["RAND_AUGMENT=(2, 31)"], 4, "RAND_AUGMENT = (2, 31): must be None"),
        (["RAND_AUGMENT=(2, 0, 1)"], 4, "RAND_AUGMENT = (2, 0, 1): must be None"),
        (["RAND_AUGMENT=(2, 9)"], 4, "AUTO_AUGMENT and RAND_AUGMENT: give one"),
        (["RANDOM_RESIZED_CROP=0.3"], 4, "RANDOM_RESIZED_CROP and RANDOM_CROP_PADDING 4"),
        (["RANDOM_RESIZED_CROP=0"], 4, "RANDOM_RESIZED_CROP = 0: must be a number > 0"),
        (["WARMUP_STEPS=100"], 4, "WARMUP_EPOCHS 40 and WARMUP_STEPS 100"),
        (["WARMUP_EPOCHS=None"], 4, "WARMUP_EPOCHS is missing"),
        (
            ["POSITIONS=sincos", "HIDDEN_SIZE=30", "INITIAL_WEIGHTS=usual", "NUM_HEADS=2"],
            4,
            "POSITIONS 'sincos': needs a HIDDEN_SIZE that is a multiple of 4",
        ),
        (
            ["INITIAL_WEIGHTS=mimetic", "HIDDEN_SIZE=30", "NUM_HEADS=2"],
            4,
            "INITIAL_WEIGHTS 'mimetic': needs a HIDDEN_SIZE",
        ),
        (["CUDA_GRAPHS=True"], 4, "CUDA_GRAPHS: needs a GPU"),
        (["CUDA_GRAPHS=yes"], 4, "CUDA_GRAPHS = 'yes': must be True, False or \"auto\""),
        (["bf16=1"], 4, "bf16 = 1: must be True, False"),
        (["OPTIMIZER=sgd"], 4, "OPTIMIZER = 'sgd': must be one of 'adamw', 'muon'"),
        (["PLUGIN=gemini"], 4, "PLUGIN = 'gemini': must be one of 'torch_ddp', 'hybrid_parallel'"),
        (
            ["OPTIMIZER=muon", "PLUGIN=hybrid_parallel"],
            4,
            "OPTIMIZER 'muon': only goes with PLUGIN 'torch_ddp'",
        ),
        (
            ["OPTIMIZER=muon", "TENSOR_PARALLEL_MODE=1d", "TENSOR_PARALLEL_SIZE=2"],
            4,
            "OPTIMIZER 'muon': only goes with data parallelism",
        ),
        (
            ["POOLING=mean", "TENSOR_PARALLEL_MODE=1d", "TENSOR_PARALLEL_SIZE=2"],
            4,
            "POOLING 'mean': only goes with data parallelism",
        ),
        (
            ["POSITIONS=sincos", "TENSOR_PARALLEL_MODE=2d", "TENSOR_PARALLEL_SIZE=4"],
            4,
            "POSITIONS 'sincos': only goes with data parallelism",
        ),
        (["COMPILE=True", "parallel={'pipeline': 2}"], 4, "COMPILE True: only goes with data parallelism"),
        (["MIXUP=-1"], 4, "MIXUP = -1"),
        (["MIX_EPOCHS=3"], 4, "MIX_EPOCHS 3: nothing is mixed"),
    ],
)
def test_sizes_that_do_not_fit(overrides, world, said):
    assert any(said in message for message in problems_of(CONFIGS[-1], *overrides, world=world))


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: 1\nb: [", "line 2"),
        ("\0", "is not a Python file"),
        ("A = 1\nB = 1 / 0", "line 2: ZeroDivisionError"),
        ("A = 1\nraise SystemExit(0)", "line 2: SystemExit"),
    ],
)
def test_what_is_not_a_python_file_is_one_clear_error(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path / "a.py", text))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "none.py"))
