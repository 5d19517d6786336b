"""What `sd3_sweep.py` is made of: the grid, its folder, workers, scores, benchmark layouts and the report."""
