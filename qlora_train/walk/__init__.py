"""The training step: the walk over the layers, the activations it stores, and the optimizer."""
