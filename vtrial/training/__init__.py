"""Fitting a stage of the cascade: a framework-free loop that knows no ray and no command line."""

from vtrial.training.config import TrainingConfig, read_config
from vtrial.training.data import StoredVolumes, TensorVolume, Volume, VolumeSource, write_low
from vtrial.training.export import export_model, hardware
from vtrial.training.loop import StepReport, steps, train
from vtrial.training.stream import PhantomStream

__all__ = [
    "PhantomStream",
    "StepReport",
    "StoredVolumes",
    "TensorVolume",
    "TrainingConfig",
    "Volume",
    "VolumeSource",
    "export_model",
    "hardware",
    "read_config",
    "steps",
    "train",
    "write_low",
]
