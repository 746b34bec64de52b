"""Generating pictures: loading results, DeepFloyd IF's stages one after the other, previews, image grids."""
