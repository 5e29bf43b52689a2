"""Long-tailed instance segmentation: LVIS data, a Mask R-CNN whose box classifier knows its priors, and LVIS metrics.

One file a subcommand of ``balms detect``: train, finetune, evaluate, predict, stats. Beneath them: annotations (the JSON),
dataset (pixels and targets), sampling (repeat factors), model, roi_heads and backbones, header (checkpoints).
"""
