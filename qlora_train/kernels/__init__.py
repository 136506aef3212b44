"""Tensor functions that know nothing of models: a plain-torch reference first, faster versions beside it."""
