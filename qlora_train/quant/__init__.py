"""Quantized weights: one table of formats, quantizing, dequantizing, and the kernels of both."""
