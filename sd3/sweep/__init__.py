"""`python -m sd3.sweep`: the grid, its folder, workers, scores, benchmark layouts and the report."""
