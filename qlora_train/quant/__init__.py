"""Quantized weights: their formats, quantizing and dequantizing, and the kernels for both."""
