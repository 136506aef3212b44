"""Training: the layer walk, the optimizer step, the loop around it, and a run's folder."""

from qlora_train.train.run import TrainResult, train

__all__ = ["TrainResult", "train"]
