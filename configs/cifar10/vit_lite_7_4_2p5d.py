"""ViT-Lite-7/4 on CIFAR-10 from scratch, 2.5d tensor parallel. Model and recipe: vit_lite_7_4_vanilla.py.

Command   DATA=/path/to/cifar-10-batches-py torchrun --nproc_per_node=4 train.py --config=configs/cifar10/vit_lite_7_4_2p5d.py
          size is depth x a square: --set TENSOR_PARALLEL_SIZE=8 TENSOR_PARALLEL_DEPTH=2 for two layers of 2 x 2
Proved    50 fp32 steps follow one process within 1.7e-06 in the loss, 8.2e-06 in the gradient norm (relative), 9.1e-08 in
          the weights after step 1, of depth 1 and 2, and with data parallel: results/parallelism/table.md
Measured  accuracy not, in this form
"""

from vit_lite_7_4_vanilla import *

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = "2.5d"
TENSOR_PARALLEL_DEPTH = 1

parallel = dict(
    pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE, depth=TENSOR_PARALLEL_DEPTH)
)
