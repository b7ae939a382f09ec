"""ViT-S/16 on ImageNet-1k from scratch, 1d tensor parallel. Model and recipe: vit_s_16_vanilla.py.

Command   export DATA=/path/to/imagenet
          torchrun --nproc_per_node=8 train.py --config=configs/imagenet/vit_s_16_1d.py
          2 processes times a power of two; sizes 3 and 6 divide the 6 heads too, 4 does not
Published about 74.5 % top-1 in 16.5 hours on eight A100s
Measured  accuracy not measured with this config
"""

from vit_s_16_vanilla import *

TENSOR_PARALLEL_SIZE = 2
TENSOR_PARALLEL_MODE = "1d"

parallel = dict(pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE))
