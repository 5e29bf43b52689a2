"""From images to arrays: long-tailed profiles, sources, manifests and pixels. NumPy and Pillow only, no torch."""
