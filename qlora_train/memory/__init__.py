"""What is alive when, and where: activation policies and the meter."""
