"""Checkpoints in the middle of a run, as an earlier program wrote them: checkpoints/<name>/<checkpoint>.

A user's checkpoint must be read by every later program. The launches of the tests resume these; while
recording, they make them first. The paths in their settings are relative, so a run that continues from one
starts where its models, "images" and "cifar-10-batches-py" are.
"""

import os
import shutil
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "checkpoints"
RECORD = os.environ.get("RECORD_CHECKPOINTS") == "1"  # by hand: record.py leaves them as they are
SIZES = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
# Folder -> size: ViTs of some thousand weights. Each dropout of hybrid_parallel has a random state of 5 kB.
MODELS = {
    "golden_model": SIZES | dict(num_hidden_layers=2),
    "golden_model_short": SIZES | dict(num_hidden_layers=1),
}
# processes -> name -> (step of the checkpoint, flags of vit_train_demo.py). An epoch has 6 steps on one
# process, 3 on two. At its end there are rows and a best epoch to remember, in it a place among its images.
CASES = {
    1: {
        "torch_ddp": (6, "--plugin torch_ddp --model_name_or_path golden_model"),
        "gemini": (4, "--plugin gemini --precision bf16 --model_name_or_path golden_model"),
    },
    2: {
        "low_level_zero": (
            2,
            "--plugin low_level_zero --precision fp16 --ema 0.8 --model_name_or_path golden_model",
        ),
        "hybrid_parallel": (
            2,
            "--plugin hybrid_parallel --tp_size 2 --model_name_or_path golden_model_short",
        ),
    },
}


def keep(name: str, checkpoint: Path) -> None:
    """Make ``checkpoint`` the golden of that name."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    shutil.copytree(checkpoint, FOLDER / name / checkpoint.name)
