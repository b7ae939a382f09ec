"""The demo and a prediction in the surroundings of a batch job, a container or an old terminal."""

import json
import os
import subprocess
import sys

from helpers import ROOT, write_folder

# An encoding that lacks a class's name, no home, the temporary folder of a job that ended, ranks of another
# launch. The first two variables keep Python from taking UTF-8 for this locale.
SURROUNDINGS = dict(
    **dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="POSIX"),
    **dict(HOME="/proc/none", TMPDIR="/nonexistent", TERM="dumb"),
    **dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", MASTER_ADDR="gone", MASTER_PORT="1"),
)


def test_demo_and_prediction_run_in_poor_surroundings(tmp_path):
    write_folder(tmp_path / "images", {"train": 8, "validation": 4}, classes=("樱花", "red"))
    given = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")}
    run = dict(MODEL="vit-demo", DATASET="images", OUTPUT_PATH="out", GPUNUM="1", EPOCH="1", BS="8")
    env = given | SURROUNDINGS | run | dict(PYTHON=sys.executable, INSTALL="0", CUDA_VISIBLE_DEVICES="")
    options = dict(env=env, cwd=tmp_path, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
    done = subprocess.run(["bash", ROOT / "run_demo.sh"], **options)
    assert done.returncode == 0, done.stderr.decode()
    assert "樱花" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["id2label"] == {
        "0": "red",
        "1": "樱花",
    }
    images = sorted((tmp_path / "images" / "validation").glob("*/*.png"))
    words = [sys.executable, ROOT / "vit_predict.py", "--model", "out", "--topk", "2", *images]
    done = subprocess.run(words, **options)
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\u6a31\\u82b1" in done.stdout and b"red" in done.stdout
