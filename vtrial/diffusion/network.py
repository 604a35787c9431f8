"""The denoising network: EDM2's magnitude-preserving U-Net in 3D, one class from the paper's size to the bundled one.

`layout="edm2"` is the published architecture (a residual block for every change of resolution, every encoder output a
skip connection). `layout="light"` spends fewer operations at the finest level: resampling costs no block of its own, a
level has one skip connection, and both sides have the same number of blocks.

The network sees space-to-depth grids: with `patch` p, a volume of 2 channels is a grid of 2·p³ channels with sides p
times shorter (`vtrial.diffusion.conditions.to_grid`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from vtrial.diffusion.conditions import VOLUME_CHANNELS
from vtrial.diffusion.layers import Block, MPConv, MPFourier, Resample, mp_concat, mp_silu, mp_sum
from vtrial.diffusion.voxels import Look, VoxelHead

COORDINATES = 3
Positive = Annotated[int, Field(ge=1)]


class NetworkConfig(BaseModel):
    """Shape of a network. Lists run from the finest level to the coarsest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Literal["edm2", "light"] = "light"
    patch: Literal[1, 2, 4] = 1
    channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (64, 128, 192, 256)
    blocks: tuple[Positive, ...] = (3, 3, 3, 3)
    merge: Literal["concat", "sum"] = "concat"
    edge_kernel: Literal[1, 3] = 3
    """Kernel of the first and last convolution; 1 lets a whole volume's context be computed once for all steps."""
    attention_head_channels: Annotated[int, Field(ge=0)] = 64
    """Channels of a head of the attention at the coarsest level; 0: no attention (fully convolutional)."""
    low_resolution: bool = False
    """Whether the upsampled low-resolution pair is an input (stage 2)."""
    coordinates: bool = False
    """Whether the position in the whole volume is an input (three channels from -1 to 1)."""
    demographics: Literal["channels", "embedding"] = "embedding"
    """Constant channels (as published), or modulation of every block together with the noise level."""
    condition_center: tuple[float, ...] = (0.70, 0.48, 0.5, 0.60)
    condition_scale: tuple[float, ...] = (0.10, 0.18, 0.5, 0.17)
    """Conditions enter an embedding as (value - center) / scale."""
    embedding_shift: bool = False
    """Whether the embedding also adds to the modulated features, beside scaling them."""
    gated_output: bool = False
    """Whether the output holds a gate on the noisy input, voxel by voxel: a local Wiener filter costs no features."""

    voxel_channels: Annotated[int, Field(ge=0)] = 0
    """Channels of a small network on single voxels after the U-Net (`VoxelHead`); 0: none. A block of p³ voxels shares
    the features of one place of the grid, too few for each voxel to be decided by itself, as sharp edges need."""

    @model_validator(mode="after")
    def _consistent(self) -> NetworkConfig:
        if len(self.channels) != len(self.blocks):
            raise ValueError("channels and blocks need the same number of levels")
        if len(self.condition_center) != len(self.condition_scale):
            raise ValueError("condition_center and condition_scale need the same length")
        last, head = self.channels[-1], self.attention_head_channels
        if head and last % max(1, last // head):
            raise ValueError(f"the last of channels ({last}) must be a multiple of attention_head_channels ({head})")
        return self

    @property
    def grid_channels(self) -> int:
        """Channels of the noisy grid."""
        return VOLUME_CHANNELS * self.patch**3

    @property
    def conditions(self) -> int:
        """Length of the condition vector."""
        return len(self.condition_center)

    @property
    def context_channels(self) -> int:
        """Channels beside the noisy grid, the constant 1 included."""
        low = self.grid_channels if self.low_resolution else 0
        vector = self.conditions if self.demographics == "channels" else 0
        return low + COORDINATES * self.coordinates + vector + 1

    @property
    def divisor(self) -> int:
        """Sides of a volume must be multiples of this many voxels."""
        return int(self.patch * 2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class Conditions:
    """What is known of a batch: `vector` (b, k); `low` (b, 2p³, x, y, z) and `coordinates` (b, 3, x, y, z) or None.

    All in the units of the network: the condition vector as published, the low-resolution grid with magnitude near 1.
    """

    vector: Tensor
    low: Tensor | None = None
    coordinates: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """The part of the network that does not depend on the noisy input: computed once for all sampling steps."""

    context: Tensor
    embedding: Tensor | None

    def crop(self, where: tuple[slice, slice, slice]) -> Prepared:
        """The same for a part of the grid."""
        return Prepared(self.context[(slice(None), slice(None), *where)], self.embedding)


class _Ascend(nn.Module):
    """On the way up: fewer channels at the coarse grid, then trilinear doubling."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.project = MPConv(cin, cout, 1)
        self.up = Resample("up")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.up(self.project(x))
        return out


class Network(nn.Module):
    """F(x; c_noise, conditions) of EDM, (b, 2p³, x, y, z) -> the same shape. Zero at initialisation."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        widest = max(config.channels)
        self.noise_features = MPFourier(config.channels[0])
        self.noise_embedding = MPConv(config.channels[0], widest, 0)
        if config.demographics == "embedding":
            self.condition_embedding = nn.ModuleList(
                [MPConv(config.conditions + 1, widest, 0), MPConv(widest, widest, 0)]
            )
        self.entry = MPConv(config.grid_channels + config.context_channels, config.channels[0], config.edge_kernel)
        self.encoder = nn.ModuleList()
        self.encoder_kept: list[bool] = []
        self.decoder = nn.ModuleList()
        self.decoder_merges: list[bool] = []
        if config.layout == "edm2":
            _build_edm2(self, widest)
        else:
            _build_light(self, widest)
        outputs = config.grid_channels * (2 if config.gated_output else 1)
        self.exit = MPConv(config.channels[0], outputs, config.edge_kernel, learned_gain=True)
        self.voxel_head = (
            VoxelHead(config.channels[0], config.voxel_channels, config.patch) if config.voxel_channels else None
        )

    def prepare(self, conditions: Conditions, shape: tuple[int, int, int], dtype: torch.dtype) -> Prepared:
        """Everything that depends on the conditions alone, for a grid of `shape`, computed in `dtype`.

        ValueError if a condition is missing or a side cannot be halved once a level.
        """
        levels = 2 ** (len(self.config.channels) - 1)
        if any(side % levels for side in shape):
            raise ValueError(f"grid {shape}: sides must be multiples of {levels}")
        vector = conditions.vector.float()
        parts = [vector.new_ones(vector.shape[0], 1, *shape)]
        embedding = None
        if self.config.demographics == "channels":
            parts.append(vector[:, :, None, None, None].expand(-1, -1, *shape))
        else:
            embedding = self._embed_conditions(vector)
        if self.config.coordinates:
            # uniform on [-1, 1] has magnitude 1/√3
            parts.append(_needed(conditions.coordinates, "coordinates") * 3.0**0.5)
        if self.config.low_resolution:
            parts.append(_needed(conditions.low, "a low-resolution pair"))
        context = torch.cat([p.to(dtype) for p in parts], dim=1).contiguous(memory_format=torch.channels_last_3d)
        return Prepared(self.entry(context, slice(self.config.grid_channels, None)), embedding)

    def _embed_conditions(self, vector: Tensor) -> Tensor:
        center = vector.new_tensor(self.config.condition_center)
        scale = vector.new_tensor(self.config.condition_scale)
        values = torch.cat([(vector - center) / scale, torch.ones_like(vector[:, :1])], dim=1)
        first, second = self.condition_embedding
        out: Tensor = second(mp_silu(first(values)))
        return out

    def forward(self, x: Tensor, c_noise: Tensor, prepared: Prepared, look: Look | None = None) -> Tensor:
        """F for a noisy grid `x` (b, 2p³, x, y, z), scaled to magnitude 1, and c_noise (b,) = ln(sigma)/4.

        `look` is how a voxel head sees F, and how its correction becomes one of F; needed where there is one.
        """
        embedding = self.noise_embedding(self.noise_features(c_noise))
        if prepared.embedding is not None:
            embedding = mp_sum(embedding, prepared.embedding.expand_as(embedding))
        embedding = mp_silu(embedding)
        h = self.entry(x, slice(0, self.config.grid_channels)) + prepared.context
        skips = [h] if self.config.layout == "edm2" else []
        for block, kept in zip(self.encoder, self.encoder_kept, strict=True):
            h = block(h, embedding)
            if kept:
                skips.append(h)
        merge = mp_concat if self.config.merge == "concat" else mp_sum
        for block, merges in zip(self.decoder, self.decoder_merges, strict=True):
            h = block(merge(h, skips.pop()) if merges else h, embedding)
        out: Tensor = self.exit(h)
        if self.config.gated_output:
            direct, gate = out.chunk(2, dim=1)
            out = torch.addcmul(direct, gate, x)
        if self.voxel_head is None:
            return out
        if look is None:
            raise ValueError("a network with a voxel head needs a look at voxels")
        view, back = look(out)
        return out + back(self.voxel_head(h, c_noise, view))

    def normalize_(self) -> None:
        """Forced weight normalisation of every layer (EDM2 equation 66); call after each optimiser step."""
        for layer in _mp_layers(self):
            layer.normalize_()

    def fold_(self, dtype: torch.dtype) -> Network:
        """Make this copy an inference-only one that computes in `dtype`."""
        for layer in _mp_layers(self):
            layer.fold_(dtype)
        return self.eval()


def _mp_layers(module: nn.Module) -> list[MPConv]:
    return [m for m in module.modules() if isinstance(m, MPConv)]


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this network needs {name}")
    return value


def _build_edm2(net: Network, embedding: int) -> None:
    """Encoder and decoder as published (EDM2 figure 21, with attention only in the bottleneck)."""
    config = net.config
    skip_channels = [config.channels[0]]
    cin = config.channels[0]

    def encode(block: Block, cout: int) -> None:
        net.encoder.append(block)
        net.encoder_kept.append(True)
        skip_channels.append(cout)

    for level, (cout, count) in enumerate(zip(config.channels, config.blocks, strict=True)):
        if level:
            encode(Block(cin, cin, embedding, encoder=True, resample="down", shift=config.embedding_shift), cin)
        for _ in range(count):
            encode(Block(cin, cout, embedding, encoder=True, shift=config.embedding_shift), cout)
            cin = cout

    def decode(channels: int, cout: int, merges: bool, resample: str = "keep", heads: int = 0) -> None:
        net.decoder.append(
            Block(
                channels, cout, embedding, encoder=False, resample=resample, heads=heads, shift=config.embedding_shift
            )
        )
        net.decoder_merges.append(merges)

    decode(cin, cin, False, heads=config.attention_head_channels)
    decode(cin, cin, False)
    for level in reversed(range(len(config.channels))):
        cout = config.channels[level]
        if level < len(config.channels) - 1:
            decode(cin, cin, False, resample="up")
        for _ in range(config.blocks[level] + 1):
            decode(cin + skip_channels.pop(), cout, True)
            cin = cout


def _build_light(net: Network, embedding: int) -> None:
    """One skip connection a level, resampling without blocks of its own."""
    config = net.config
    last = len(config.channels) - 1
    cin = config.channels[0]
    for level, (cout, count) in enumerate(zip(config.channels, config.blocks, strict=True)):
        for i in range(count):
            down = "down" if level and i == 0 else "keep"
            net.encoder.append(Block(cin, cout, embedding, encoder=True, resample=down, shift=config.embedding_shift))
            net.encoder_kept.append(level < last and i == count - 1)
            cin = cout
    for level in reversed(range(len(config.channels))):
        cout = config.channels[level]
        if level < last:
            net.decoder.append(_Ascend(cin, cout))
            net.decoder_merges.append(False)
        for i in range(config.blocks[level]):
            merges = level < last and i == 0
            channels = 2 * cout if merges and config.merge == "concat" else cout
            heads = config.attention_head_channels if level == last and i == 0 else 0
            net.decoder.append(
                Block(channels, cout, embedding, encoder=False, heads=heads, shift=config.embedding_shift)
            )
            net.decoder_merges.append(merges)
        cin = cout
