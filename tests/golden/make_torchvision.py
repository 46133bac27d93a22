"""Makes torchvision.json: logits of PyTorch's own ResNets on weights that a formula gives.

    pip install torch==2.14.1 torchvision==0.29.1 numpy
    python tests/golden/make_torchvision.py

torchvision's nets are its own modules. RepDistiller's CIFAR ResNet is restated from its paper's
description (arXiv 1910.10699) with its published layer names. Only names, shapes and logits are
stored: `fill` gives the weights here and in the test, from integers, so to the last bit.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from formula_weights import fill

OUT = pathlib.Path(__file__).with_name("torchvision.json")
SHAPE = (2, 3, 37, 33)  # odd, so that every padding counts


class Block(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(nn.Module):
    def __init__(self, blocks, widths, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, width in enumerate(widths[1:], 1):
            layers = []
            for block in range(blocks):
                layers.append(Block(inputs, width, 2 if stage > 1 and block == 0 else 1))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


NETS = {
    "torchvision_basic": lambda: ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5),
    "torchvision_bottleneck": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5),
    "repdistiller": lambda: CifarResNet(2, [8, 8, 16, 32], 5),
    "repdistiller_x4": lambda: CifarResNet(1, [8, 16, 32, 64], 5),
}


def main():
    found = {}
    images = torch.from_numpy(fill("images.weight", SHAPE, 0) * 40)
    for name, make in NETS.items():
        net = make().eval()
        names = [n for n in net.state_dict() if not n.endswith("num_batches_tracked")]
        shapes = {n: list(net.state_dict()[n].shape) for n in names}
        state = {n: torch.from_numpy(fill(n, s, i)) for i, (n, s) in enumerate(shapes.items())}
        net.load_state_dict(state, strict=False)
        net = net.double()
        with torch.no_grad():
            logits = net(images.double()).numpy()
        found[name] = {"shapes": shapes, "logits": np.round(logits, 9).tolist()}
        print(name, logits)
    OUT.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
