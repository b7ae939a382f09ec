"""ViT-Lite-7/4 on CIFAR-10 from scratch, 1d tensor parallel. Model and recipe: vit_lite_7_4_vanilla.py.

Command   export DATA=/path/to/cifar-10-batches-py
          torchrun --nproc_per_node=4 train.py --config=configs/cifar10/vit_lite_7_4_1d.py
          4 processes times a power of two; --set TENSOR_PARALLEL_SIZE=2 for two
Tested    50 fp32 steps against one process: within 1.9e-06 in the loss, 8.4e-06 in the gradient norm
          (relative), 1.2e-07 in the weights after step 1; alone, and with data parallelism and a pipeline:
          results/parallelism/table.md
Measured  accuracy not measured with this config
"""

from vit_lite_7_4_vanilla import *

TENSOR_PARALLEL_SIZE = 4
TENSOR_PARALLEL_MODE = "1d"

parallel = dict(pipeline=1, tensor=dict(mode=TENSOR_PARALLEL_MODE, size=TENSOR_PARALLEL_SIZE))
