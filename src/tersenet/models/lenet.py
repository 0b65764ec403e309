"""LeNet with 5x5 filters, for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.models.initialise import he_normal


class LeNet(nn.Module):
    """(N, in_channels, 32, 32) -> (N, classes): two 5x5 convolutions without padding, each with ReLU and 2x2 max-pool,
    and three linear layers."""

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        second = max(1, width * 8 // 3)
        self.conv1 = nn.Conv2d(in_channels, width, 5)
        self.conv2 = nn.Conv2d(width, second, 5)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(5)
        self.fc1 = nn.Linear(second * 25, 20 * width)
        self.fc2 = nn.Linear(20 * width, 14 * width)
        self.fc3 = nn.Linear(14 * width, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.conv1(x)))
        x = self.avgpool(self.maxpool(self.relu(self.conv2(x))))
        x = self.relu(self.fc2(self.relu(self.fc1(x.flatten(1)))))
        return self.fc3(x)


def lenet5(classes: int = 10, in_channels: int = 3, width: int = 6) -> LeNet:
    """LeNet-5 with ReLU and max-pooling; 6 and 16 channels, 120 and 84 hidden units, all scale with `width`.

    On 32x32 images the average pool does nothing; it is there for other sizes.
    Source: LeCun et al. 1998, Gradient-Based Learning Applied to Document Recognition.
    """
    return LeNet(classes, in_channels, width)
