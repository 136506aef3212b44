"""Storage of the frozen weights (device, RAM, disk): quantization at load, streaming to the device."""
