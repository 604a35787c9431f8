"""From a training run to a segmenter's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vtrial.segmentation.card import SegmenterCard, write_segmenter
from vtrial.segmentation.fit.config import SegmenterConfig
from vtrial.segmentation.fit.loop import FitState, read_checkpoint
from vtrial.segmentation.fit.network import architecture, folded


def export_segmenter(
    run: str | Path,
    out: str | Path,
    *,
    offsets: Mapping[str, float] | None = None,
    dice: Mapping[str, float] | None = None,
    volume_bias: Mapping[str, float] | None = None,
    description: str = "",
    hardware: str = "",
) -> SegmenterCard:
    """Write card and averaged weights of a training `run` (a folder of `train_segmenter`) to the folder `out`.

    `offsets` are added to the logits of heads by name: above 0 their regions grow. `dice` and `volume_bias` (percent)
    go into the card. InputError for an unreadable run.
    """
    config, state = read_checkpoint(Path(run))
    weights = folded(config.network, len(config.heads), state.average.state(state.network))
    known = offsets or {}
    bias = f"decoder.seg_layers.{len(config.network.features) - 2}.bias"
    weights[bias] = weights[bias] + torch.tensor([known.get(name, 0.0) for name in config.heads])
    card = SegmenterCard(
        name=config.name,
        description=description,
        training_data=trained_on(config, state),
        phantoms_only=True,
        hardware=hardware,
        mode=config.mode,
        heads=config.regions,
        patch_size=config.patch_size,
        median_shape=config.median_shape,
        intensity=config.intensity,
        architecture=architecture(config.network),
        dice=dict(dice or {}),
        volume_bias=dict(volume_bias or {}),
    )
    return write_segmenter(Path(out), weights, card)


def trained_on(config: SegmenterConfig, state: FitState) -> str:
    """What a card says of the training: the phantoms, and how far it has come."""
    return f"{state.source}; {state.step} steps of {config.batch}"
