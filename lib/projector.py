"""A clip's patches become video tokens: three branches of small convolutions, mixed by the gate.

Layer for layer as in the released checkpoints, whose keys the attribute names are.

Legend   B prompts   F frames   n patches of a frame, on an h x h map   C width of the vision tower   D width of the decoder
"""

import torch
import torch.nn.functional as F
from torch import nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = ChannelNorm(c_out, eps=1e-5)  # the reference's name; it is a layer norm

    def forward(self, x):
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)

    def forward(self, x):
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class RegBlock(nn.Module):
    """A RegNet-Y block with depthwise 3x3: (N, c_in, h, w) -> (N, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = ConvNorm(c_in, c_out, 1)
        self.conv2 = ConvNorm(c_out, c_out, 3, groups=c_out)
        self.se = SqueezeExcite(
            c_out, round(c_in / 4)
        )  # a quarter of what comes in, not of what goes out
        self.conv3 = ConvNorm(c_out, c_out, 1)
        self.downsample = ConvNorm(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        return F.silu(self.conv3(self.se(y)) + self.downsample(x))


class RegStage(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.b1, self.b2 = RegBlock(c_in, c_out), RegBlock(c_out, c_out)

    def forward(self, x):
        return self.b2(self.b1(x))


def two_layers(c_in: int, hidden: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, hidden), nn.GELU(), nn.Linear(hidden, c_out))


class VideoProjector(nn.Module):
    """Three views of the same patches (whole scene, body, face), mixed by the gate."""

    def __init__(self, c_in: int, width: int):
        super().__init__()
        for branch in ("video", "body"):
            self.add_module(f"s1_{branch}", RegStage(c_in, width))
            # Sees frames t-1 and t and halves the map; index 0 holds the weights, as in the checkpoint.
            self.add_module(
                f"sampler_{branch}",
                nn.Sequential(
                    nn.Conv3d(width, width, 2, stride=(1, 2, 2), padding=(1, 0, 0)), nn.SiLU()
                ),
            )
            self.add_module(f"s2_{branch}", RegStage(width, width))
            self.add_module(f"readout_{branch}", two_layers(width, width, width))
        self.mlp_2xgelu_face = two_layers(c_in, width, width)

    def forward(self, patches: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """patches (B, F, n, C) on an h x h map, weights (B, 3) -> (B, F * h/2 * h/2, D)."""
        B, frames, n, C = patches.shape
        h = int(n**0.5)
        maps = patches.reshape(B * frames, h, h, C).permute(0, 3, 1, 2)  # (B*F, C, h, h)
        tokens = [self._branch(name, maps, B) for name in ("video", "body")] + [
            self._face(patches, h)
        ]
        return sum(w[:, None, None] * t for w, t in zip(weights.unbind(1), tokens))

    def _branch(self, name: str, maps: torch.Tensor, B: int) -> torch.Tensor:
        x = self.get_submodule(f"s1_{name}")(maps)  # (B*F, D, h, h)
        x = x.unflatten(0, (B, -1)).transpose(1, 2)  # (B, D, F, h, h)
        x = self.get_submodule(f"sampler_{name}")(x)[:, :, :-1]  # (B, D, F, h/2, h/2)
        x = x.transpose(1, 2).flatten(0, 1)  # (B*F, D, h/2, h/2)
        x = self.get_submodule(f"s2_{name}")(x)
        x = x.flatten(2).transpose(1, 2).unflatten(0, (B, -1)).flatten(1, 2)  # (B, F*h/2*h/2, D)
        return self.get_submodule(f"readout_{name}")(x)

    def _face(self, patches: torch.Tensor, h: int) -> torch.Tensor:
        B, frames = patches.shape[:2]
        x = self.mlp_2xgelu_face(patches)  # (B, F, n, D)
        x = x.flatten(0, 1).transpose(1, 2).unflatten(2, (h, h))  # (B*F, D, h, h)
        x = F.interpolate(
            x, size=((h + 1) // 2, (h + 1) // 2), mode="bilinear", align_corners=False
        )
        return x.flatten(2).transpose(1, 2).unflatten(0, (B, frames)).flatten(1, 2)
