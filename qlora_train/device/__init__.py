"""The compute device: what is known of it (description.py), its streams and memory (compute.py), and what a
run tells torch about it (settings.py). The only place that asks which kind of device it is."""
