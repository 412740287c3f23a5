"""The kernels for GPUs, lowered by Pallas through Triton.

The files of this folder alone import Pallas-Triton, which jax >= 0.11 calls deprecated (at
lowering).
"""

from pallas_kernels.triton.dense import can_pair as can_pair
from pallas_kernels.triton.dense import expand as expand
from pallas_kernels.triton.dense import multiply as multiply
from pallas_kernels.triton.grouped import multiply_blocks as multiply_blocks
from pallas_kernels.triton.grouping import MOST_PAIRS as MOST_PAIRS
from pallas_kernels.triton.grouping import group_few_pairs as group_few_pairs
