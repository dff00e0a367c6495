"""`python -m quant` is `gateway quantize`."""

from quant.cli import quantize

quantize(prog_name="python -m quant")
