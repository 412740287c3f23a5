"""Machine code of GPUs executed on a CPU: what the kernels' PTX does, thread by thread.

What is proved: the code that XLA's compiler leaves, executed with the meaning that the PTX ISA
gives each instruction, computes the right numbers and keeps the rules whose breach a GPU would not
tell. What is not: that NVIDIA's assembler translates it rightly, the weak order of memory, the bits
of approximate functions, and how tensor cores round (docs/numerics.md has a bound).

    text -> parse -> kernel -> for each block: schedule -> opcodes -> registers, memory,
                                                                      tensor_memory, barriers
"""

from tests.ptx.faults import EarlyRead, Fault
from tests.ptx.kernel import Kernel
from tests.ptx.memory import Part
from tests.ptx.parse import Refused
from tests.ptx.text import run
