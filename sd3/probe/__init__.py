"""`python -m sd3.probe`: measures the text stream of a model block by block, and computes rotations from it."""
