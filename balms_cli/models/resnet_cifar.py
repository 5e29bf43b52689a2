"""ResNet for 32 px images (He et al., CVPR 2016, section 4.2): 6n + 2 layers, option-A shortcuts, 64 features.

ResNet-32 with the linear head is the backbone of every CIFAR-LT row of the paper. Initialisation: He et al., ICCV 2015,
as in the CIFAR ResNets of the long-tail literature (LDAM-DRW, models/resnet_cifar.py).
"""

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (8, 20, 32, 44, 56)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the width grows, the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.pad or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out.add_(x), inplace=True)


class ResNetCifar(nn.Module):
    """Images [B, 3, H, W] to features [B, 64]."""

    feature_dim = 64

    def __init__(self, depth: int):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        plan = [(16, 1)] * n + [(32, 2)] + [(32, 1)] * (n - 1) + [(64, 2)] + [(64, 1)] * (n - 1)
        blocks, width_in = [], 16
        for width, stride in plan:
            blocks.append(BasicBlock(width_in, width, stride))
            width_in = width
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return self.blocks(out).mean((2, 3))
