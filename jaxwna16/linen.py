"""The layers for Linen: `jaxwna16.linen.QuantDense` and `jaxwna16.linen.QuantMoE`."""

from jaxwna16.layers.linen import QuantDense as QuantDense
from jaxwna16.layers.linen import QuantMoE as QuantMoE
