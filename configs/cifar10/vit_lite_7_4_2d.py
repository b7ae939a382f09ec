"""ViT-Lite-7/4 on CIFAR-10 from scratch, 2d tensor parallel. Model and recipe: vit_lite_7_4_vanilla.py.

Command   export DATA=/path/to/cifar-10-batches-py
          torchrun --nproc_per_node=4 train.py --config=configs/cifar10/vit_lite_7_4_2d.py
          4 processes, a mesh of 2 x 2, times a power of two of data parallelism
Tested    50 fp32 steps against one process: within 1.7e-06 in the loss, 7.8e-06 in the gradient norm
          (relative), 9.1e-08 in the weights after step 1; alone, and with data parallelism:
          results/parallelism/table.md
Measured  accuracy not measured with this config
"""

from vit_lite_7_4_vanilla import *

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = "2d"

parallel = dict(pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE))
