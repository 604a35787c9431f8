"""The state of a training run on disk, written whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from vtrial.course import save_whole
from vtrial.diffusion.denoiser import Denoiser, StageConfig
from vtrial.diffusion.ema import PowerEma
from vtrial.diffusion.weights import ModelCard, StageCard, load_weights, model_folder, read_card
from vtrial.optimizer import Optimizer, is_matrix
from vtrial.records import InputError, Support
from vtrial.training.config import TrainingConfig, WatchConfig

CHECKPOINT, KEPT = "checkpoint.pt", "checkpoints"
# fields that may change between a run and its continuation
FREE_FIELDS = {"steps", "checkpoint_steps", "metric_steps", "microbatch", "watch", "sampler"}


@dataclass
class TrainingState:
    """Everything that changes while training, and what on: `data_sha256`, "" where that is not known.

    Random numbers depend on (seed, step), so no generator is in it.
    """

    stage: StageConfig
    support: Support
    denoiser: Denoiser
    optimizer: Optimizer
    ema: PowerEma
    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    data_sha256: str = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.denoiser.parameters()).device

    def parameters(self) -> dict[str, torch.Tensor]:
        """The tensors that are averaged."""
        return dict(nn.Module.named_parameters(self.denoiser))


def new_state(config: TrainingConfig, stage: StageConfig, support: Support, device: torch.device) -> TrainingState:
    """An untrained network, its weights drawn from the configuration's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        denoiser = Denoiser(stage)
    denoiser.normalize_()
    denoiser.to(device)
    if config.trains == "voxel-head" and denoiser.network.voxel_head is not None:
        denoiser.requires_grad_(False)
        denoiser.network.voxel_head.requires_grad_(True)
    optimizer = Optimizer(denoiser.parameters(), by_muon(config, denoiser))
    ema = PowerEma(dict(denoiser.named_parameters()), config.ema)
    return TrainingState(stage, support, denoiser, optimizer, ema)


def by_muon(config: TrainingConfig, denoiser: Denoiser) -> Callable[[nn.Parameter], bool]:
    """Which parameters Muon moves, if the configuration has it: matrices, but not those of a voxel head."""
    if not config.optimizer.matrix_lr:
        return lambda _: False
    head = denoiser.network.voxel_head
    plain = {id(p) for p in head.parameters()} if head is not None else set()
    return lambda p: is_matrix(p) and id(p) not in plain


def stage_to_start_from(config: TrainingConfig, model: str | Path) -> tuple[ModelCard, StageCard]:
    """The stage of a model whose weights can begin a run, and its card; InputError if its network is another.

    A voxel head may be new: untrained it changes nothing. The objective may be another: the network's answer means the
    same for both (decision 041).
    """
    card = read_card(model)
    known = card.stages.get(config.stage)
    alike = known is not None and (known.config.network, bool(known.config.band_sd))
    without = config.network.model_copy(update={"voxel_channels": 0})
    if known is None or alike not in [(n, config.bands) for n in (config.network, without)]:
        fault = "has no such stage" if known is None else "has another network, or differs in bands"
        raise InputError(f"{model}: cannot start the {config.stage} stage from it: it {fault}")
    return card, known


def warm_state(config: TrainingConfig, model: str | Path, support: Support, device: torch.device) -> TrainingState:
    """The weights and scalings of a model's stage as the start of a new run; InputError if its network is another."""
    card, known = stage_to_start_from(config, model)
    ours = {name: getattr(config, name) for name in ("network", "objective", "low_noise")}
    state = new_state(config, known.config.model_copy(update=ours), support.union(card.support), device)
    weights = load_weights(model_folder(model) / known.file, known.sha256)
    own = state.denoiser.state_dict()
    fresh = {name: value for name, value in own.items() if ".voxel_head." in name or name.startswith("uncertainty")}
    kept = {name: value.float() for name, value in weights.items() if name in own}
    state.denoiser.load_state_dict(fresh | kept)
    state.denoiser.normalize_()
    return state


def _comparable(config: TrainingConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=FREE_FIELDS)


def save_checkpoint(folder: Path, config: TrainingConfig, state: TrainingState) -> Path:
    """Write the state; the previous checkpoint stays until the new one is on the disk. OSError if it cannot be."""
    content = {
        "config": config.model_dump_json(),
        "stage": state.stage.model_dump_json(),
        "support": json.dumps(asdict(state.support)),
        "denoiser": state.denoiser.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ema": {str(length): average for length, average in state.ema.averages.items()},
        "step": state.step,
        "skipped": state.skipped,
        "seconds": state.seconds,
        "data_sha256": state.data_sha256,
    }
    save_whole(folder / CHECKPOINT, content)
    return folder / CHECKPOINT


def keep_checkpoints(folder: Path, watch: WatchConfig, step: int) -> None:
    """Let the checkpoint of a step stay as checkpoints/<step>.pt where `watch` asks for it, and drop what it need not.

    Files are linked, so the last one takes no space twice.
    """
    kept = folder / KEPT
    if watch.keep_last > 1 or (watch.keep_steps and step % watch.keep_steps == 0):
        kept.mkdir(exist_ok=True)
        part = kept / f".{step:08d}.part"
        part.unlink(missing_ok=True)
        try:
            part.hardlink_to(folder / CHECKPOINT)
        except OSError:  # a file system without links
            shutil.copyfile(folder / CHECKPOINT, part)
        part.replace(kept / f"{step:08d}.pt")
    every = sorted(kept.glob("*.pt"))
    last = every[-watch.keep_last :] if watch.keep_last > 1 else []
    for path in every:
        if path not in last and not (watch.keep_steps and int(path.stem) % watch.keep_steps == 0):
            path.unlink()


def read_checkpoint(path: Path, device: torch.device | str = "cpu", *, lazily: bool = False) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values only; InputError if it cannot be read.

    With `lazily` tensors are read when they are used.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True, mmap=lazily)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a readable checkpoint: {error}") from None
    return content


def read_support(text: str) -> Support:
    """The support as `save_checkpoint` wrote it."""
    return TypeAdapter(Support).validate_json(text)


def saved_step(folder: Path) -> int:
    """The step of the checkpoint in `folder`; 0 where there is none yet."""
    path = folder / CHECKPOINT
    return int(read_checkpoint(path, lazily=True)["step"]) if path.exists() else 0


def check_run(folder: Path, config: TrainingConfig, data_sha256: str = "") -> None:
    """InputError if `folder` holds a run of another configuration, or on other data where both are known."""
    if (folder / CHECKPOINT).exists():
        _compare(folder, config, data_sha256, read_checkpoint(folder / CHECKPOINT, lazily=True))


def _compare(folder: Path, config: TrainingConfig, data_sha256: str, content: dict[str, Any]) -> None:
    then, now = _comparable(config_of(content, folder)), _comparable(config)
    changed = [name for name in now if now[name] != then[name]]
    problems = []
    if changed:
        problems.append(f"{folder}: trained with another configuration ({', '.join(changed)}); choose another --out")
    if data_sha256 and data_of(content) not in ("", data_sha256):
        problems.append(
            f"{folder}: trained on other data (sha256 {data_of(content)[:12]}…, now {data_sha256[:12]}…); give --data "
            "as it was, or another --out, which --start-from lets begin with a model's weights"
        )
    if problems:
        raise InputError(problems)


def config_of(content: dict[str, Any], folder: Path) -> TrainingConfig:
    """The configuration of a checkpoint in `folder`; InputError where another version wrote what this one lacks."""
    try:
        return TrainingConfig.model_validate_json(content["config"])
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise InputError(
            f"{folder}: trained by another version of vtrial (its configuration has {fields}); end it with that one, "
            "or choose another --out"
        ) from None


def data_of(content: dict[str, Any]) -> str:
    """Hash of what a checkpoint was trained on; "" where it does not tell, as early ones do not."""
    return str(content.get("data_sha256", ""))


def restore_state(folder: Path, config: TrainingConfig, device: torch.device, data_sha256: str = "") -> TrainingState:
    """The state of an interrupted run; InputError if it was made with another configuration or on other data."""
    content = read_checkpoint(folder / CHECKPOINT, device)
    _compare(folder, config, data_sha256, content)
    stage = StageConfig.model_validate_json(content["stage"])
    state = new_state(config, stage, read_support(content["support"]), device)
    state.denoiser.load_state_dict(content["denoiser"])
    state.optimizer.load_state_dict(content["optimizer"])
    for length, average in content["ema"].items():
        for name, value in average.items():
            state.ema.averages[float(length)][name].copy_(value)
    state.step, state.skipped, state.seconds = content["step"], content["skipped"], content["seconds"]
    state.data_sha256 = data_of(content) or data_sha256
    return state
