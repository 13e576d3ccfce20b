"""Runs nested pipeline schedules on processes: start at `pipeline.py`, then `run.py`."""
