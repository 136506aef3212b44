"""`qlora-train doctor`: whether this machine can train as fast as its hardware allows, and what to change."""
