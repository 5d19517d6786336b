"""The scenes of coloured shapes that the shipped model draws, and a scorer that reads them back."""
