"""What a packed weight is and how it multiplies. Users import `jaxwna16`, which re-exports this."""

from pallas_kernels.backends import explain as explain
from pallas_kernels.errors import BackendError as BackendError
from pallas_kernels.errors import SpecError as SpecError
from pallas_kernels.errors import TableError as TableError
from pallas_kernels.errors import Wna16Error as Wna16Error
from pallas_kernels.format.dequantize import dequantize as dequantize
from pallas_kernels.format.quantize import quantize as quantize
from pallas_kernels.format.spec import QuantSpec as QuantSpec
from pallas_kernels.matmul import quant_matmul as quant_matmul
from pallas_kernels.matmul import quant_matmul_gated as quant_matmul_gated
from pallas_kernels.matmul import quant_matmul_many as quant_matmul_many
from pallas_kernels.moe import float_moe as float_moe
from pallas_kernels.moe import quant_moe as quant_moe
from pallas_kernels.step.routing import route as route
