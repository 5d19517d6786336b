"""The small model that ships: how it is made and scored."""
