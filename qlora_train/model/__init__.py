"""The frozen base model: reading it, quantizing it, and the parts that a training step walks over."""
