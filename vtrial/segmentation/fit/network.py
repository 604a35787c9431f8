"""The network while it is trained, and the same one as the segmenter keeps it.

It is trained with batch normalisation, whose fixed scales are multiplied into the kernels afterwards: what is shipped
is convolutions alone, which is faster, and the result does not depend on how a volume is cut into patches.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtrial.records import InputError
from vtrial.segmentation.card import Architecture
from vtrial.segmentation.fit.config import NetworkConfig

_CLASS = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
FIRST_LOGIT = -2.0


def architecture(config: NetworkConfig) -> Architecture:
    """What nnU-Net builds at run time: no normalisation, biases instead."""
    arguments: dict[str, Any] = {
        "n_stages": len(config.features),
        "features_per_stage": list(config.features),
        "conv_op": "torch.nn.Conv3d",
        "kernel_sizes": [[3, 3, 3] for _ in config.features],
        "strides": [list(stride) for stride in config.strides],
        "n_conv_per_stage": list(config.convolutions),
        "n_conv_per_stage_decoder": list(config.decoder_convolutions),
        "conv_bias": True,
        "norm_op": None,
        "norm_op_kwargs": None,
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(
        network_class=_CLASS, arguments=arguments, requires_import=("conv_op", "norm_op", "dropout_op", "nonlin")
    )


def build(config: NetworkConfig, heads: int, *, normalise: bool) -> nn.Module:
    """The network with `heads` outputs, with batch normalisation (for training) or without.

    (b, 1, z, y, x) → logits (b, heads, z, y, x). InputError where the package with nnU-Net's networks is missing.
    """
    arguments = architecture(config).arguments | {"norm_op": None, "conv_op": nn.Conv3d, "nonlin": nn.LeakyReLU}
    if normalise:
        arguments |= {"norm_op": nn.BatchNorm3d, "conv_bias": False}
    module, name = _CLASS.rsplit(".", 1)
    try:
        made = getattr(importlib.import_module(module), name)(
            input_channels=1, num_classes=heads, deep_supervision=False, **arguments
        )
    except ImportError as error:
        raise InputError(f"training a segmenter needs totalsegmentator and what comes with it ({error})") from None
    for part in made.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(part.weight, a=0.01)
    for part in made.decoder.seg_layers:  # most voxels are in no region
        nn.init.constant_(part.bias, FIRST_LOGIT)
    return cast(nn.Module, made)


@torch.no_grad()
def folded(config: NetworkConfig, heads: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network without normalisation that gives what `state`, with it, gives in evaluation."""
    trained, plain = build(config, heads, normalise=True), build(config, heads, normalise=False)
    trained.load_state_dict(state)
    targets = dict(plain.named_modules())
    done: set[int] = set()
    for name, part in trained.named_modules():
        conv, norm = getattr(part, "conv", None), getattr(part, "norm", None)
        if isinstance(conv, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
            _fold(conv, norm, cast(nn.Conv3d, targets[f"{name}.conv"]))
            done.add(id(conv))
    for name, part in trained.named_modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d) and id(part) not in done:
            target = cast(nn.Conv3d, targets[name])
            target.weight.copy_(part.weight)
            if target.bias is not None:
                target.bias.copy_(torch.zeros_like(target.bias) if part.bias is None else part.bias)
    return plain.state_dict()


def _fold(conv: nn.Conv3d, norm: nn.BatchNorm3d, target: nn.Conv3d) -> None:
    assert norm.running_var is not None and norm.running_mean is not None and target.bias is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    target.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1, 1))
    target.bias.copy_(norm.bias - norm.running_mean * scale)
