"""Training and scoring of the small model that ships."""
