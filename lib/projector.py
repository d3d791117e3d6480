"""The video projector: the patches of a clip become video tokens.

All layers are those of the released checkpoints, and the attribute names are the keys of those
checkpoints.

Legend   B prompts   F frames   n patches of a frame, on an h x h map
         C width of the vision tower   D width of the decoder   N maps in a batch (B * F)
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_norm(c_in: int, c_out: int, kernel: int, groups: int = 1) -> nn.Sequential:
    """Return a convolution and a layer norm: (N, c_in, h, w) -> (N, c_out, h, w)."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
    # The reference code names the second layer `bn`, but it is a layer norm.
    return nn.Sequential(OrderedDict(conv=conv, bn=ChannelNorm(c_out, eps=1e-5)))


class SqueezeExcite(nn.Module):
    """Multiply every channel by a gate, which is computed from the means of all channels."""

    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)  # (N, channels, 1, 1)
        gate = self.fc2(F.silu(self.fc1(means))).sigmoid()
        return x * gate


class RegBlock(nn.Module):
    """A RegNet-Y block with a depthwise 3x3 convolution: (N, c_in, h, w) -> (N, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = conv_norm(c_in, c_out, 1)
        self.conv2 = conv_norm(c_out, c_out, 3, groups=c_out)
        # The squeeze width is a quarter of the block's input channels, not of its output channels.
        self.se = SqueezeExcite(c_out, round(c_in / 4))
        self.conv3 = conv_norm(c_out, c_out, 1)
        self.downsample = conv_norm(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = F.silu(self.conv1(x))
        y = F.silu(self.conv2(y))
        y = self.conv3(self.se(y))
        return F.silu(y + self.downsample(x))


def reg_stage(c_in: int, c_out: int) -> nn.Sequential:
    """Return two RegNet-Y blocks: (N, c_in, h, w) -> (N, c_out, h, w)."""
    return nn.Sequential(OrderedDict(b1=RegBlock(c_in, c_out), b2=RegBlock(c_out, c_out)))


def two_layers(c_in: int, hidden: int, c_out: int) -> nn.Sequential:
    """Return a two-layer perceptron with a GELU: (..., c_in) -> (..., c_out)."""
    return nn.Sequential(nn.Linear(c_in, hidden), nn.GELU(), nn.Linear(hidden, c_out))


class VideoProjector(nn.Module):
    """Three branches over the same patches (whole scene, body, face), weighted by the gate."""

    def __init__(self, c_in: int, width: int):
        super().__init__()
        for branch in ("video", "body"):
            self.add_module(f"s1_{branch}", reg_stage(c_in, width))
            # The convolution sees frames t-1 and t, and halves the height and width of the map.
            convolution = nn.Conv3d(width, width, 2, stride=(1, 2, 2), padding=(1, 0, 0))
            # nn.Sequential gives the convolution the index 0, as in the checkpoint's keys.
            self.add_module(f"sampler_{branch}", nn.Sequential(convolution, nn.SiLU()))
            self.add_module(f"s2_{branch}", reg_stage(width, width))
            self.add_module(f"readout_{branch}", two_layers(width, width, width))
        self.mlp_2xgelu_face = two_layers(c_in, width, width)

    def forward(self, patches: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return video tokens: patches (B, F, n, C), weights (B, 3) -> (B, F * h/2 * h/2, D).

        `weights` are the gate's, for the branches whole scene, body and face.
        """
        B, frames, n, C = patches.shape
        h = int(n**0.5)
        maps = patches.reshape(B * frames, h, h, C).permute(0, 3, 1, 2)  # (B*F, C, h, h)

        scene = self._branch("video", maps, B)  # (B, F*h/2*h/2, D)
        body = self._branch("body", maps, B)
        face = self._face(patches, h)

        scene_weight, body_weight, face_weight = weights[:, :, None, None].unbind(1)  # (B, 1, 1)
        return scene_weight * scene + body_weight * body + face_weight * face

    def _branch(self, name: str, maps: torch.Tensor, B: int) -> torch.Tensor:
        """Return the tokens of branch "video" or "body": (B*F, C, h, h) -> (B, F*h/2*h/2, D)."""
        x = self.get_submodule(f"s1_{name}")(maps)  # (B*F, D, h, h)
        x = x.unflatten(0, (B, -1)).transpose(1, 2)  # (B, D, F, h, h)
        # The convolution pads with a frame of zeros at both ends, so it returns F + 1 maps. The
        # last map, of the last frame and zeros, is dropped.
        x = self.get_submodule(f"sampler_{name}")(x)[:, :, :-1]  # (B, D, F, h/2, h/2)
        x = x.transpose(1, 2).flatten(0, 1)  # (B*F, D, h/2, h/2)
        x = self.get_submodule(f"s2_{name}")(x)
        x = x.flatten(2).transpose(1, 2).unflatten(0, (B, -1)).flatten(1, 2)  # (B, F*h/2*h/2, D)
        return self.get_submodule(f"readout_{name}")(x)

    def _face(self, patches: torch.Tensor, h: int) -> torch.Tensor:
        """Return the tokens of the face branch: (B, F, n, C) -> (B, F*h/2*h/2, D)."""
        B, frames = patches.shape[:2]
        half = (h + 1) // 2
        x = self.mlp_2xgelu_face(patches)  # (B, F, n, D)
        x = x.flatten(0, 1).transpose(1, 2).unflatten(2, (h, h))  # (B*F, D, h, h)
        x = F.interpolate(x, size=(half, half), mode="bilinear", align_corners=False)
        return x.flatten(2).transpose(1, 2).unflatten(0, (B, frames)).flatten(1, 2)
