"""ViT-Lite-7/4 on CIFAR-10 from scratch, 2.5d tensor parallel. Model and recipe: vit_lite_7_4_vanilla.py.

Command   export DATA=/path/to/cifar-10-batches-py
          torchrun --nproc_per_node=4 train.py --config=configs/cifar10/vit_lite_7_4_2p5d.py
          size: depth x a square; --set TENSOR_PARALLEL_SIZE=8 TENSOR_PARALLEL_DEPTH=2 is 2 layers of 2 x 2
Tested    50 fp32 steps against one process: within 1.7e-06 in the loss, 8.2e-06 in the gradient norm
          (relative), 9.1e-08 in the weights after step 1; with depth 1 and 2, and with data parallelism:
          results/parallelism/table.md
Measured  accuracy not measured with this config
"""

from vit_lite_7_4_vanilla import *

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = "2.5d"
TENSOR_PARALLEL_DEPTH = 1

parallel = dict(
    pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE, depth=TENSOR_PARALLEL_DEPTH)
)
