"""`python -m sd3.probe`: what the text stream of a model knows at each block, and rotations from it."""
