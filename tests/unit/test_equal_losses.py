"""equal_losses.py, which compares the losses of two environments."""

import json

import equal_losses
import pytest


@pytest.mark.parametrize(
    "case, other, status",
    [
        ("train tp2", 1.0000005, 0),
        ("train tp2", 1.000002, 1),
        ("train tp2", float("nan"), 1),
        ("train tp2 bf16", 1.001, 0),
    ],
)
def test_fp32_losses_must_be_equal_to_1e_6(tmp_path, monkeypatch, capsys, case, other, status):
    for name, loss in {"one": 1.0, "other": other}.items():
        seen = {case: {"losses": [(2.0).hex(), loss.hex()], "norms": [loss.hex()]}}
        seen["train ddp"] = {"losses": [(1.0).hex()]}
        (tmp_path / name).write_text(json.dumps({"parallel_cases.py, 2": seen}))
    monkeypatch.setattr("sys.argv", ["equal_losses.py", str(tmp_path / "one"), str(tmp_path / "other")])
    assert equal_losses.main() == status
    assert f"| {case.removeprefix('train ')}, 2 processes |" in capsys.readouterr().out


def test_file_that_lacks_a_part_is_not_equal(tmp_path, monkeypatch, capsys):
    part = {"train tp2": {"losses": [(1.0).hex()]}}
    (tmp_path / "one").write_text(json.dumps({"parallel_cases.py, 1": part, "parallel_cases.py, 2": part}))
    (tmp_path / "other").write_text(json.dumps({"parallel_cases.py, 1": part}))
    monkeypatch.setattr("sys.argv", ["equal_losses.py", str(tmp_path / "one"), str(tmp_path / "other")])
    assert equal_losses.main() == 1
    assert "parallel_cases.py, 2" in capsys.readouterr().err
