"""ViT-Lite-7/4 on CIFAR-10 from scratch, 3d tensor parallel. Model and recipe: vit_lite_7_4_vanilla.py.

Command   export DATA=/path/to/cifar-10-batches-py
          torchrun --nproc_per_node=8 train.py --config=configs/cifar10/vit_lite_7_4_3d.py
          8 processes, a cube of 2 x 2 x 2, times a power of two of data parallelism
Tested    50 fp32 steps against one process: within 1.7e-06 in the loss, 6.9e-06 in the gradient norm
          (relative), 9.3e-08 in the weights after step 1; on 8 processes: results/parallelism/table.md
Measured  accuracy not measured with this config
"""

from vit_lite_7_4_vanilla import *

TENSOR_PARALLEL_SIZE = 8
TENSOR_PARALLEL_MODE = "3d"

parallel = dict(pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE))
