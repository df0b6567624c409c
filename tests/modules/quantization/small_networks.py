"""Networks that are quick to reconstruct, with blocks of the kinds that real ones have."""

import timm
import torch
from torch import nn
from torch.nn import functional


def conv_norm(before, after, kernel=3, stride=1, groups=1):
    return [nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(after)]


class Residual(nn.Module):
    """Two convolutions, one shared activation that works in place, and a shortcut with a convolution if need be."""

    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(before, after, stride=stride)
        self.conv2, self.bn2 = conv_norm(after, after)
        self.relu = nn.ReLU(inplace=True)
        plain = before == after and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Sequential(*conv_norm(before, after, 1, stride))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expansion, depth-wise convolution, projection; what comes in is overwritten by an activation in place."""

    def __init__(self, channels):
        super().__init__()
        self.act = nn.ReLU6(inplace=True)
        self.body = nn.Sequential(
            *conv_norm(channels, 3 * channels, 1),
            nn.ReLU6(inplace=True),
            *conv_norm(3 * channels, 3 * channels, groups=3 * channels),
            nn.ReLU6(inplace=True),
            *conv_norm(3 * channels, channels, 1),
        )

    def forward(self, x):
        x = self.act(x)
        return x + self.body(x)


class Gated(nn.Module):
    """A block that reads two tensors."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x, gate):
        return functional.relu(self.first(x)) + self.second(gate)


class SmallNetwork(nn.Module):
    def __init__(self, *blocks, channels=8, classes=5):
        super().__init__()
        self.conv, self.norm = conv_norm(3, channels)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.blocks(self.act(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


class GatedNetwork(SmallNetwork):
    def __init__(self):
        super().__init__(Residual(8, 8))
        self.gated = Gated(8)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return self.head(self.gated(self.blocks(x), x).mean((2, 3)))


def vit():
    """With weights of a size at which blocks do something; timm's initial ones hardly do."""
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
    return network


NETWORKS = {
    "residual": lambda: SmallNetwork(Residual(8, 8), Residual(8, 12, 2), Residual(12, 12), channels=8),
    "depthwise": lambda: SmallNetwork(InvertedResidual(8), InvertedResidual(8)),
    "vit": vit,
}


def make(name, seed=0):
    """A network with statistics of its own, in evaluation mode."""
    torch.manual_seed(seed)
    network = GatedNetwork() if name == "gated" else NETWORKS[name]()
    if name == "residual":
        network.head = nn.Linear(12, 5)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(images(32, seed=torch.randint(1000, ()).item()))
    return network.eval()


def images(count, seed=0, size=16):
    """Smooth pictures, as noise has nothing that layers could compensate."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(coarse, size=(size, size), mode="bilinear")
