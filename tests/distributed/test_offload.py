"""Gemini whose passes are recorded, and whose optimizer steps beside the graph, mostly on the CPU."""

import json
import os

import pytest
from conftest import ROOT, torchrun


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload") / "found.json"
    environment = os.environ | {"VIT_DISABLE_PATCHES": "cpu_gemini"}
    done = torchrun(1, ROOT / "tests" / "distributed" / "offload_cases.py", path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["fp16, all", "fp16, half", "fp16, nothing", "bf16, all"])
def test_replayed_steps_train_as_usual(found, name):
    usual, replayed = found[name]["usual"], found[name]["replayed"]
    assert replayed["losses"] == usual["losses"] and usual["losses"][-1] < usual["losses"][0] - 0.1


def test_it_is_the_same_training_wherever_the_optimizer_is(found):
    everywhere = [found[name]["usual"]["losses"] for name in ("fp16, all", "fp16, half", "fp16, nothing")]
    assert everywhere[0] == everywhere[1] == everywhere[2]


@pytest.mark.parametrize("name", ["fp16, all", "fp16, half", "bf16, all"])
def test_every_evaluation_has_the_weights_that_were_loaded(found, name):
    assert found["loaded"][name] == [found["loaded"][name][0]] * 3
    if name != "bf16, all":
        assert found["loaded"][name] == found["loaded"]["fp16, nothing"]


@pytest.mark.parametrize("name", ["fp16, all", "fp16, half", "fp16, nothing"])
def test_the_factor_of_the_loss_changes_where_a_graph_reads_it(found, name):
    usual, replayed = found[name]["usual"], found[name]["replayed"]
    assert replayed["scales"] == usual["scales"] and len(set(usual["scales"])) > 3
    assert replayed["places"] == 1 < usual["places"]
