"""The planner: what a run will take, decided before anything is loaded. Bytes come from a walk without
numbers (planned_walk.py), seconds from counts of work (time_model.py)."""
