"""Scenes of coloured shapes, which the shipped model draws, and a scorer that detects them in images."""
