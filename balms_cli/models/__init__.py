"""Networks: feature extractors, the heads on them, and how both are named."""
