"""The frozen base model: reading it, packing it, and the parts that a training step walks over."""
