"""Using a model without training it: generation, by the same walk over the layers."""
