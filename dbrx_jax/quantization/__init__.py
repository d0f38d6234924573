"""Weight-only quantisation: int8, int4 and fp8 weights in one type of array.

A weight is an integer (or an 8-bit float) times a scale. int8 and fp8 have a scale per output channel; int4 has one
per group of weights along the contraction. Qwix's QArray is not used because it does not pack int4: jnp.int4 takes
a byte on the disk, and in memory with jax 0.10.
"""

from dbrx_jax.quantization.array import QuantizedArray as QuantizedArray
from dbrx_jax.quantization.formats import Format as Format
from dbrx_jax.quantization.formats import Quantization as Quantization
from dbrx_jax.quantization.quantize import quantize as quantize
