"""The frozen base model, its LoRA parameters and its loss: the parts that a training step walks over."""
