"""Where the frozen weights wait (device, RAM, disk) and how they come to the device."""
