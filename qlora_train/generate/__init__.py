"""Text generation with a base or a run, by the same walk over the layers as in training."""
