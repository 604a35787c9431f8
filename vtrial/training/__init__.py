"""Fitting a stage of the cascade: a framework-free loop that knows no ray and no command line."""

from vtrial.training.checkpoint import saved_step
from vtrial.training.config import TrainingConfig, read_config
from vtrial.training.data import StoredVolumes, TensorVolume, Volume, VolumeSource, write_low
from vtrial.training.export import export_model, hardware
from vtrial.training.fitting import Job, train
from vtrial.training.folder import held, in_turn, writing
from vtrial.training.loop import StepReport, steps
from vtrial.training.share import Share, usual_device
from vtrial.training.stream import PhantomStream

__all__ = [
    "Job",
    "PhantomStream",
    "Share",
    "StepReport",
    "StoredVolumes",
    "TensorVolume",
    "TrainingConfig",
    "Volume",
    "VolumeSource",
    "export_model",
    "hardware",
    "held",
    "in_turn",
    "read_config",
    "saved_step",
    "steps",
    "train",
    "usual_device",
    "write_low",
    "writing",
]
