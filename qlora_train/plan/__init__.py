"""The planner: predicts a run's memory and time, and chooses how it runs, before anything is loaded.

Bytes come from running the program on meta tensors, which have shapes but no data (planned_walk.py); seconds
come from counts of FLOPs and copied bytes (time_model.py)."""
