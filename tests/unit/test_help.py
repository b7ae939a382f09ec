"""What --help shows: groups, defaults and a text for every flag."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT

from args import benchmark_parser, finetune_parser, scratch_parser
from vit.resolve import DEMO_DEFAULTS, TRAINING_DEFAULTS

GROUPS = [
    "most used",
    "data",
    "optimisation",
    "augmentation and regularisation",
    "parallelism, precision and memory",
    "output",
    "advanced",
]
MOST_USED = (
    "--model_name_or_path --dataset --output_path --plugin --preset --batch_size --learning_rate --num_epoch "
    "--image_size --resume"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """What `vit_train_demo.py --help` prints."""
    run = subprocess.run(
        [sys.executable, ROOT / "vit_train_demo.py", "--help"],
        cwd=tmp_path_factory.mktemp("empty"),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 0 and run.stderr == ""
    return run.stdout


def test_flags_are_in_named_groups_and_the_most_used_come_first(text):
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == ["options", *GROUPS]
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert flags[: len(MOST_USED)] == MOST_USED
    first = text[text.index("\nmost used:") : text.index("\ndata:")]
    assert re.findall(r"^  (--\w+)", first, re.MULTILINE) == MOST_USED
    assert len(set(flags)) == len(flags)  # none is in two groups


def test_no_default_is_none_or_named_twice(text):
    joined = " ".join(text.split())
    for word in ("(default: None)", "(default: False)", "(default: True)", "==SUPPRESS=="):
        assert word not in joined
    assert not re.search(r"\(default: [^()]*\) \(default:", joined)
    assert "--seed INT of initial weights, order and augmentation (default: 42)" in joined


@pytest.mark.parametrize("parser", [finetune_parser, benchmark_parser, scratch_parser])
def test_every_flag_has_a_help_text(parser):
    made = parser()
    assert len(made._actions) > 10
    for action in made._actions:
        assert action.help and len(action.help.split()) > 1, action.option_strings
        assert "None" not in made.formatter_class("")._expand_help(action), action.option_strings


def test_defaults_in_the_help_are_those_that_apply():
    """Those that follow from the model are written in the text, and could differ from the values."""
    texts = {action.dest: action.help for action in finetune_parser()._actions}
    for name, value in TRAINING_DEFAULTS.items():
        if isinstance(value, bool):
            continue
        written = re.search(r"default: ([^;)]+)(?:; vit-demo ([^)]+))?\)", texts[name])
        assert float(written[1]) == value, name
        assert float(written[2] or written[1]) == DEMO_DEFAULTS[name], name
