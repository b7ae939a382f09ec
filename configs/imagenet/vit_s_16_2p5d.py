"""ViT-S/16 on ImageNet-1k from scratch, 2.5d tensor parallel. Model and recipe: vit_s_16_vanilla.py.

Command   export DATA=/path/to/imagenet
          torchrun --nproc_per_node=8 train.py --config=configs/imagenet/vit_s_16_2p5d.py
          size: depth x a square; --set TENSOR_PARALLEL_SIZE=8 TENSOR_PARALLEL_DEPTH=2 is 2 layers of 2 x 2
Published about 74.5 % top-1 in 16.5 hours on eight A100s
Measured  accuracy not measured with this config
"""

from vit_s_16_vanilla import *

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = "2.5d"
TENSOR_PARALLEL_DEPTH = 1

parallel = dict(
    pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE, depth=TENSOR_PARALLEL_DEPTH)
)
