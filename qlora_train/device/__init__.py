"""The compute device: its description (description.py), streams and memory (compute.py), torch settings
(settings.py). No other folder distinguishes kinds of devices."""
