"""Using the model without training it: evaluation and generation, by the same walk over the layers."""
