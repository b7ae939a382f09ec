"""ViT-Lite-7/4 on CIFAR-10 from scratch, 2d tensor parallel. Model and recipe: vit_lite_7_4_vanilla.py.

Command   DATA=/path/to/cifar-10-batches-py torchrun --nproc_per_node=4 train.py --config=configs/cifar10/vit_lite_7_4_2d.py
          any multiple of 4 processes: a mesh of 2 x 2, times data parallel
Measured  not measured yet
"""

from vit_lite_7_4_vanilla import *

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = "2d"

parallel = dict(
    pipeline=1,
    tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE),
)
