"""The planner: what a run will take, decided before anything is loaded. No module here imports torch."""
