"""Tensor functions independent of any model: a reference in plain torch, and faster versions of it."""
