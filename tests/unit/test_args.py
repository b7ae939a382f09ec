"""The settings that the flags of vit_train_demo.py, the presets and the machine give."""

import pytest
from helpers import ROOT

from vit.environment import predict_command, recorded_command


def test_settings_of_the_fixture_are_good(parse):
    assert parse().notes == ()


def test_published_settings_are_taken_with_one_line(parse):
    settings = parse("--tp_size 2 --pp_size 2 --plugin gemini", gpus=1)
    expected = "TP_SIZE and PP_SIZE are for hybrid_parallel; gemini runs data parallel on all 1"
    assert settings.notes == (expected,)
    layout = settings.layout
    assert (layout.data_parallel_size, layout.tensor_size, layout.pipeline_size) == (1, 1, 1)


def test_published_settings_run(one):
    result = one["published settings"]
    assert result["code"] == 0, result["err"]
    assert result["out"].count("TP_SIZE and PP_SIZE are for hybrid_parallel") == 1
    assert "Evaluation result for epoch 1: average_loss=" in result["out"]


PUBLISHED = {
    "torch_ddp": "fp32",
    "torch_ddp_fp16": "fp16",
    "low_level_zero": "fp16",
    "gemini": "fp16",
    "hybrid_parallel": "fp16",
}


@pytest.mark.parametrize("plugin, precision", PUBLISHED.items())
def test_published_preset_is_the_default_with_a_gpu(parse, plugin, precision):
    settings = parse(f"--plugin {plugin}", gpus=1)
    assert (settings.preset, settings.precision, settings.grad_checkpoint) == ("published", precision, True)
    assert settings.offload_optim_frac == (1.0 if plugin == "gemini" else 0.0)
    names = ("batch_size", "learning_rate", "num_epoch", "weight_decay", "warmup_ratio", "seed", "augment")
    assert [getattr(settings, name) for name in names] == [32, 1e-4, 3, 0.05, 0.3, 42, False]


@pytest.mark.parametrize("bf16, expected", [(True, "bf16"), (False, "fp16")])
def test_fast_preset_is_16_bit_without_recomputation_and_offload(parse, bf16, expected):
    settings = parse("--preset fast --plugin gemini", gpus=1, bf16=bf16)
    found = (settings.precision, settings.grad_checkpoint, settings.offload_optim_frac)
    assert found == (expected, False, 0.0)


def test_defaults_follow_the_machine(parse):
    settings = parse(local=False)
    found = (settings.model_name_or_path, settings.dataset, settings.plugin, settings.precision)
    assert found == ("vit-demo", "drawn", "torch_ddp", "fp32")
    what = "training the small embedded model on synthetic leaf images (MODEL and DATASET choose others)"
    assert settings.notes == (f"no GPU: {what}",)


@pytest.mark.parametrize(
    "given, expected", [("", 8), ("--batch_size 6", 6), ("--batch_size 4 --num_microbatches 2", 2)]
)
def test_microbatches_divide_the_batch(parse, given, expected):
    settings = parse(f"--plugin hybrid_parallel --pp_size 2 {given}", world=2)
    assert settings.num_microbatches == expected and settings.batch_size % expected == 0


def test_auto_means_the_default(parse):
    flags = "plugin precision batch_size learning_rate num_epoch preset zero_stage".split()
    assert parse(" ".join(f"--{flag} auto" for flag in flags)) == parse()


def test_check_stops_before_anything_is_done(parse, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--check")
    assert end.value.code == 0 and list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_commands_are_recorded_as_they_can_be_given_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/there/train.py", "--config", "a b.py"])
    assert recorded_command() == "python train.py --config 'a b.py'"
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (
        recorded_command() == "python train.py --config 'a b.py'"
    )  # each started by hand, with flags that say so
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert recorded_command() == "torchrun --nproc_per_node=8 train.py --config 'a b.py'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert recorded_command() == "torchrun --nnodes=2 --nproc_per_node=4 train.py --config 'a b.py'"


def test_how_to_predict_is_said_for_where_the_run_was_started(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert predict_command("out").endswith(" vit_predict.py --model out IMAGE_OR_FOLDER")
    monkeypatch.chdir(ROOT / "tests")
    assert predict_command("out").endswith(" ../vit_predict.py --model out IMAGE_OR_FOLDER")
