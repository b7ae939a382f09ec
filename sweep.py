"""Fine-tune with every combination of several lists of values. `bash run_finetuning.sh` calls it."""

import sys

from vit.console import silence_libraries

silence_libraries()  # before anything imports colossalai

from args import finetune_settings
from vit.sweep import main

if __name__ == "__main__":
    sys.exit(main(finetune_settings))
