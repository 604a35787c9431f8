"""Training: data cut as published, exact resumption, learning, faults, export with hashes."""

import copy
import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.blobs import SHAPE, blob, tensor_blob, tiny, write_blobs
from vtrial.cohort.registry import find_spec
from vtrial.cohort.spec import read_spec
from vtrial.cohort.support import support_of
from vtrial.course import Metrics, follow
from vtrial.diffusion.conditions import Demographics, upsample
from vtrial.diffusion.denoiser import Scaling, load_denoiser
from vtrial.diffusion.sampler import SamplerConfig
from vtrial.diffusion.weights import load_weights, read_card, save_weights, verify_model
from vtrial.execution import CannotGoOn
from vtrial.geometry import LOW_SHAPE
from vtrial.optimizer import Muon, Optimizer, is_matrix, orthogonal
from vtrial.pipeline.training import fit_stage, train_here
from vtrial.records import InputError, Support
from vtrial.training import (
    Job,
    Share,
    StoredVolumes,
    TensorVolume,
    TrainingConfig,
    export_model,
    held,
    read_config,
    steps,
    train,
    write_low,
)
from vtrial.training.batches import Batch, make_batch, measure_scaling, origin_at_peak, patch_pair, sharpness
from vtrial.training.checkpoint import new_state, read_checkpoint, warm_state
from vtrial.training.config import OptimizerConfig
from vtrial.training.data import PHASES, data_sha256, sample_low
from vtrial.training.fitting import open_source
from vtrial.training.loop import dtype_for, learn

STAGES = ["global", "super-resolution"]


class Stream:
    """An endless source: every draw is a new body, as phantoms rendered on the fly would be."""

    device = torch.device("cpu")
    refresh_steps = 1
    support = Support(age_years=(30, 80), height_cm=(155, 185), weight_kg=(50, 110))

    def draw(self, rng: np.random.Generator, epoch: int) -> TensorVolume:
        return tensor_blob(int(rng.integers(2**31)))

    def draw_low(self, rng: np.random.Generator, epoch: int) -> tuple[torch.Tensor, tuple[int, int, int], Demographics]:
        volume, phase = self.draw(rng, epoch), PHASES[int(rng.integers(64))]
        return sample_low(volume, phase), phase, volume.demographics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs", 4)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_the_64_subvolumes_partition_the_volume() -> None:
    volume = tensor_blob(0)
    whole = torch.full((2, *SHAPE), torch.nan)
    for x, y, z in PHASES:
        whole[:, x::4, y::4, z::4] = sample_low(volume, (x, y, z))
    assert torch.equal(whole, volume.pair)


@pytest.mark.parametrize("origin", [(0, 0, 0), (16, 16, 32), (8, 4, 16)])
def test_a_patch_has_the_upsampling_of_the_whole_volume(origin: tuple[int, int, int]) -> None:
    volume, shape = tensor_blob(0), (16, 16, 32)
    high, block, inner = patch_pair(volume, origin, shape)
    part = tuple(slice(o, o + s) for o, s in zip(origin, shape))
    assert torch.equal(high, volume.pair[(slice(None), *part)])
    whole = upsample(sample_low(volume, (1, 1, 1)))
    assert torch.allclose(upsample(block, inner, shape), whole[(slice(None), *part)], atol=1e-6)


def test_hot_spots_of_the_low_resolution_pet_get_more_patches(data: Path) -> None:
    """Of all voxels that stand out the hot one does most; a patch that was drawn for it holds it, anywhere inside."""
    pet = 0.3 + 0.02 * torch.rand(8, 8, 16, generator=torch.Generator().manual_seed(0))
    pet[5, 2, 9] += 0.4
    sharp = sharpness(pet)
    assert sharp.sum() == pytest.approx(1.0) and sharp[5, 2, 9] == sharp.max() > 0.9
    origins = [origin_at_peak(np.random.default_rng(i), sharp, (32, 32, 64), (16, 16, 32), 4) for i in range(200)]
    held = [all(o <= 4 * v + 1 < o + s for o, v, s in zip(o3, (5, 2, 9), (16, 16, 32))) for o3 in origins]
    assert np.mean(held) > 0.9
    places = [sorted({o3[axis] for o3 in origins}) for axis in range(3)]
    assert places[0] == [8, 12, 16] and places[1] == [0, 4, 8] and places[2] == [8, 12, 16, 20, 24, 28, 32]


def test_stage_two_sees_the_low_resolution_volume_with_the_stated_noise(data: Path) -> None:
    def batch(noise: tuple[float, float]) -> Batch:
        return make_batch(tiny("super-resolution", low_noise=noise, batch=32), StoredVolumes(data), 7)

    clean, noisy = batch((0.0, 0.0)), batch((0.01, 0.04))
    assert clean.upsampled is not None and noisy.upsampled is not None
    added = (noisy.upsampled - clean.upsampled)[:, :, 1::4, 1::4, 1::4]
    assert added[:, 0].std() == pytest.approx(0.01, rel=0.05) and added[:, 1].std() == pytest.approx(0.04, rel=0.05)
    assert torch.allclose(noisy.target + noisy.upsampled, clean.target + clean.upsampled, atol=1e-6)


def test_stored_volumes_are_encoded(data: Path) -> None:
    source = StoredVolumes(data, phases=2)
    low, phase, person = source.draw_low(np.random.default_rng(0), epoch=0)
    i = source.demographics.index(person)
    x, y, z = phase
    assert torch.allclose(low, tensor_blob(i).pair[:, x::4, y::4, z::4], atol=1e-3)
    assert float(low.min()) >= 0.0 and float(low.max()) <= 1.0
    assert source.support.weight_kg == (
        min(p.weight_kg for p in source.demographics),
        max(p.weight_kg for p in source.demographics),
    )


def test_subvolumes_in_memory_change_with_the_epoch_alone(data: Path) -> None:
    def draw(epoch: int) -> torch.Tensor:
        source = StoredVolumes(data, phases=2)
        return torch.stack([source.draw_low(np.random.default_rng(i), epoch)[0] for i in range(8)])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("low", [False, True])
def test_subvolumes_beyond_the_memory_are_read_from_the_files(low: bool, data: Path, tmp_path: Path) -> None:
    folder = data
    if low:
        folder = tmp_path
        (tmp_path / "subjects.parquet").write_bytes((data / "subjects.parquet").read_bytes())
        for i in range(4):
            write_low(tmp_path, f"S{i}", tensor_blob(i), np.random.default_rng(i), 6)

    def draws(source: StoredVolumes) -> torch.Tensor:
        return torch.stack([source.draw_low(np.random.default_rng(i), i // 20)[0] for i in range(40)])

    sources = [StoredVolumes(folder, phases=5, memory=memory) for memory in (0, 1, 10**9)]
    rows = [draws(source) for source in sources]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[2])
    one = 5 * 2 * 8 * 8 * 16 * 2
    assert [source.held_bytes for source in sources] == [0, one, 4 * one]
    shares = [open_source(folder, tiny("global"), torch.device("cpu"), workers) for workers in (1, 4)]
    assert shares[1].memory == shares[0].memory // 4  # type: ignore[attr-defined]


def test_stage_one_trains_from_subvolumes_alone(tmp_path: Path, data: Path) -> None:
    (tmp_path / "subjects.parquet").write_bytes((data / "subjects.parquet").read_bytes())
    with pytest.raises(InputError, match="without volumes"):
        StoredVolumes(tmp_path)
    for i in range(4):
        write_low(tmp_path, f"S{i}", tensor_blob(i), np.random.default_rng(i), 3)
    low, phase, person = StoredVolumes(tmp_path).draw_low(np.random.default_rng(5), 0)
    i = StoredVolumes(tmp_path).demographics.index(person)
    assert torch.allclose(low, sample_low(tensor_blob(i), phase), atol=1e-3)
    with pytest.raises(InputError, match="no full volumes"):
        StoredVolumes(tmp_path).draw(np.random.default_rng(0), epoch=0)


def test_stage_two_draws_full_volumes_alone(tmp_path: Path) -> None:
    write_blobs(tmp_path / "d", 4)
    for i in (0, 2, 3):
        write_low(tmp_path / "d", f"S{i}", tensor_blob(i), np.random.default_rng(i), 1)
        (tmp_path / "d" / "ct" / f"S{i}.npy").unlink()
    source = StoredVolumes(tmp_path / "d")
    assert {source.draw(np.random.default_rng(k), epoch=0).demographics for k in range(8)} == {source.demographics[1]}


def test_residual_and_upsampling_add_up_and_samples_have_no_residual(data: Path) -> None:
    config = tiny("super-resolution", data={"patch_shape": (16, 16, 32), "patches_per_volume": 1}, low_noise=(0, 0))
    batch = make_batch(config, StoredVolumes(data), 7)
    assert batch.upsampled is not None and batch.target.shape == (4, 2, 16, 16, 32)
    assert torch.allclose(batch.target[:, :, 1::4, 1::4, 1::4], torch.zeros(()), atol=1e-6)
    assert float((batch.target + batch.upsampled).min()) >= -1e-6
    assert float((batch.target + batch.upsampled).max()) <= 1.0 + 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_scaled_data_have_the_stated_sd(stage: str, data: Path) -> None:
    config, source = tiny(stage), StoredVolumes(data)
    stage_config = measure_scaling(config, source)
    scaled = torch.cat([stage_config.encode(make_batch(config, source, i).target) for i in range(1, 20)])
    sd = scaled.unflatten(1, (2, -1)).transpose(0, 1).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(sd, torch.tensor([0.5, 0.5]), atol=0.08)


@pytest.mark.parametrize("matrix_lr", [None, 0.05])
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_training_goes_on_exactly(stage: str, matrix_lr: float | None, data: Path, tmp_path: Path) -> None:
    config = tiny(
        stage,
        data={"phases": 2, "refresh_steps": 5, "patch_shape": (16, 16, 32), "peak_share": 0.5},
        optimizer={"lr": 0.02, "matrix_lr": matrix_lr, "ramp_steps": 5, "decay_after": 200},
    )
    whole = train(config, data, tmp_path / "whole")
    short = config.model_copy(update={"steps": 6})
    train(short, data, tmp_path / "parts")  # ends between two checkpoints
    parts = train(config, data, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, value in whole.denoiser.state_dict().items():
        assert torch.equal(value, parts.denoiser.state_dict()[name]), name
    for length, average in whole.ema.averages.items():
        assert all(torch.equal(v, parts.ema.averages[length][k]) for k, v in average.items())


def test_killed_training_loses_only_what_follows_the_checkpoint(data: Path, tmp_path: Path) -> None:
    config = tiny("global")
    train(config, data, tmp_path / "whole")

    def kill(line: dict[str, object]) -> None:
        if line["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, data, tmp_path / "killed", progress=kill)
    assert read_checkpoint(tmp_path / "killed" / "checkpoint.pt")["step"] == 4
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')  # a line cut off
    train(config, data, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_time_budget_and_finished_run(data: Path, tmp_path: Path) -> None:
    config = tiny("global")
    assert train(config, data, tmp_path, max_seconds=0.0).step == 1
    assert train(config, data, tmp_path).step == 12
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert train(config, data, tmp_path).step == 12
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_metrics_lie_at_the_same_steps_after_interruptions(data: Path, tmp_path: Path) -> None:
    config = tiny("global", metric_steps=5, checkpoint_steps=3)
    train(config, data, tmp_path / "whole")
    told: list[object] = []
    for seconds in (0.0, 0.0, None):
        train(config, data, tmp_path / "parts", max_seconds=seconds, progress=lambda line: told.append(line["step"]))
    assert [step for step, _ in losses(tmp_path / "whole")] == [5, 10, 12]
    assert [step for step, _ in losses(tmp_path / "parts")] == told == [1, 2, 5, 10, 12]
    assert losses(tmp_path / "parts")[3:] == losses(tmp_path / "whole")[1:]


def test_a_run_goes_on_with_the_data_it_began_with(data: Path, tmp_path: Path) -> None:
    other, run = write_blobs(tmp_path / "other", 3), tmp_path / "run"
    train(tiny("global", steps=2), data, run)
    for call in (lambda: train(tiny("global"), other, run), lambda: Job(tiny("global"), other, run).check(print)):
        with pytest.raises(InputError, match=r"trained on other data .*--start-from"):
            call()
    assert read_checkpoint(run / "checkpoint.pt")["data_sha256"] == data_sha256(data)

    content = read_checkpoint(run / "checkpoint.pt")
    del content["data_sha256"]  # as checkpoints were
    torch.save(content, run / "checkpoint.pt")
    sampler = {"global": SamplerConfig(steps=4)}
    known = export_model(tmp_path / "m", {"global": run}, sampler, name="m", data_sha256={"global": "as told"})  # type: ignore[arg-type]
    assert known.stages["global"].data_sha256 == "as told"
    train(tiny("global"), data, run)
    train(tiny("global"), data, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    card = export_model(tmp_path / "m", {"global": run}, sampler, name="m", data_sha256={"global": "as told"})  # type: ignore[arg-type]
    assert card.stages["global"].data_sha256 == data_sha256(data)


def test_one_training_at_a_time_works_in_a_folder(data: Path, tmp_path: Path) -> None:
    job = Job(tiny("global", steps=2), data, tmp_path / "run")
    with held(job.out), pytest.raises(InputError, match="another vtrial"):
        train_here(job, print)
    assert not (tmp_path / "run").exists()
    train_here(job, lambda line: None)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def test_what_a_killed_training_left_is_swept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    left = [run / ".checkpoint.pt.0123abcd.part", run / "checkpoints" / ".00000250.part"]
    for part in left:
        part.write_bytes(b"torn")
    (run / "checkpoint.pt").write_bytes(b"whole")
    with held(run):
        assert not any(part.exists() for part in left) and (run / "checkpoint.pt").read_bytes() == b"whole"
        left[0].write_bytes(b"at work")
        with pytest.raises(InputError, match="another vtrial"), held(run):
            pass
        assert left[0].exists(), "who does not hold the folder sweeps nothing"
    assert not left[0].exists()  # as a worker left it that was replaced


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """As if the disk were full: files take so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_that_cannot_be_written_is_told_and_the_old_one_stays(data: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.toml", tmp_path / "m"
    config.write_text(
        'stage = "global"\nsteps = 2\nbatch = 2\n[network]\npatch = 2\nchannels = [8, 16]\nblocks = [1, 1]\n'
        "attention_head_channels = 16\n"
    )
    fit_stage(config, data, out, lambda line: None, None, None, train_here)
    before = read_card(out)
    with small_files(4096), pytest.raises(CannotGoOn, match="the same command goes on"):
        fit_stage(config, data, out, lambda line: None, None, None, train_here)
    stage = read_card(out).stages["global"]
    assert read_card(out) == before and load_weights(out / stage.file, stage.sha256)
    assert not list(out.rglob("*.part"))


def test_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    train(tiny("global", steps=2), data, tmp_path)
    with pytest.raises(InputError, match=r"another configuration .*seed"):
        train(tiny("global", steps=2, seed=9), data, tmp_path)
    with pytest.raises(InputError, match="already"):
        train(tiny("global", steps=2), data, tmp_path, resume=False)


@pytest.mark.parametrize("stage", STAGES)
def test_a_small_set_is_learned(stage: str, data: Path) -> None:
    config = tiny(stage, steps=200)
    source = StoredVolumes(data, phases=2)
    state = new_state(config, measure_scaling(config, source), source.support, source.device)
    errors = [float(np.mean(report.errors)) for report in steps(config, source, state)]
    # noise levels differ from step to step, so compare means of many
    assert np.mean(errors[-50:]) < 0.8 * np.mean(errors[:50])


def test_an_endless_stream_is_a_source() -> None:
    config = tiny("super-resolution", steps=3)
    state = new_state(config, measure_scaling(config, Stream()), Stream.support, Stream.device)
    assert [r.step for r in steps(config, Stream(), state)] == [1, 2, 3]


def test_accumulated_parts_give_the_gradient_of_the_batch(data: Path) -> None:
    source = StoredVolumes(data)
    results = []
    for size in (4, 2):
        config = tiny("global", microbatch=size)
        state = new_state(config, measure_scaling(config, source), source.support, source.device)
        results.append([r.loss for r in islice(steps(config, source, state), 4)])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_steps_that_are_not_finite_are_skipped_and_counted(data: Path) -> None:
    class Broken(StoredVolumes):
        calls = 0

        def draw_low(self, rng, epoch):  # type: ignore[no-untyped-def]
            low, phase, person = super().draw_low(rng, epoch)
            Broken.calls += 1
            return (low * torch.nan if Broken.calls == 5 else low), phase, person

    config = tiny("global", steps=4, scaling={"center": (0.3, 0.1), "sd": (0.3, 0.1)})
    source = Broken(data)
    state = new_state(config, measure_scaling(config, source), source.support, source.device)
    skipped = [r.skipped for r in steps(config, source, state)]
    assert skipped == [False, True, False, False] and state.skipped == 1
    assert all(bool(torch.isfinite(p).all()) for p in state.denoiser.parameters())
    assert all(bool(torch.isfinite(v).all()) for a in state.ema.averages.values() for v in a.values())


class Broken(StoredVolumes):
    """Volumes of nothing but NaN."""

    def draw_low(self, rng, epoch):  # type: ignore[no-untyped-def]
        low, phase, person = super().draw_low(rng, epoch)
        return low * torch.nan, phase, person


def test_a_training_that_skips_every_step_ends(data: Path, tmp_path: Path) -> None:
    config = tiny("global", steps=40, metric_steps=5, scaling={"center": (0.3, 0.1), "sd": (0.3, 0.1)})
    for _ in range(3):  # nothing was learned that a checkpoint could hold: again is from the beginning
        with pytest.raises(CannotGoOn, match="step 20: the last 20 steps were skipped"):
            train(config, Broken(data), tmp_path)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines] == [(5, 5), (10, 10), (15, 15), (20, 20)]
    assert not any("loss" in line or "error" in line for line in lines)
    with pytest.raises(CannotGoOn, match="step 3: the last 3 steps were skipped"):
        train(config.model_copy(update={"steps": 3}), Broken(data), tmp_path / "short")


def test_a_time_budget_does_not_carry_a_training_that_skips_every_step(data: Path, tmp_path: Path) -> None:
    config = tiny("global", steps=40, scaling={"center": (0.3, 0.1), "sd": (0.3, 0.1)})
    for step in range(1, 20):
        assert train(config, Broken(data), tmp_path, max_seconds=0.0).step == step
    for _ in range(2):
        with pytest.raises(CannotGoOn, match="step 20: the last 20 steps were skipped"):
            train(config, Broken(data), tmp_path)


def test_nothing_is_saved_where_nothing_was_learned() -> None:
    plan = SimpleNamespace(steps=9, checkpoint_steps=2, metric_steps=100)
    state, saved = SimpleNamespace(step=0, seconds=0.0), []

    def reports() -> Iterator[SimpleNamespace]:
        for state.step in range(1, 10):
            yield SimpleNamespace(step=state.step, skipped=state.step in (2, 3, 4, 8))

    follow(reports(), plan, state, Metrics(None, plan, 0, lambda *_: {}), lambda: saved.append(state.step), None, None)
    assert saved == [2, 6, 8, 9]


def test_gradients_are_right_on_narrow_grids(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(config: TrainingConfig) -> torch.Tensor:
        source = StoredVolumes(data)
        state = new_state(config, measure_scaling(config, source), source.support, source.device)
        list(steps(tiny("global"), source, state, last=3))  # an untrained network has no gradients inside
        state.step = 4
        learn(config, state, make_batch(config, source, 4), Share())
        return torch.cat([p.grad.flatten() for p in state.denoiser.parameters() if p.grad is not None])

    exact = gradients(tiny("global"))  # its coarsest grid is (2, 2, 4)
    assert float((gradients(tiny("global", precision="bfloat16")) - exact).norm() / exact.norm()) < 0.1
    monkeypatch.setattr("vtrial.precision.has_bfloat16", lambda device: True)
    narrow, wide = torch.zeros(1, 16, 4, 4, 8), torch.zeros(1, 16, 6, 4, 8)
    found = [dtype_for(tiny("global", precision="bfloat16"), grid) for grid in (narrow, wide)]
    assert found == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", ["global", "global-detail", "super-resolution"])
def test_bundled_networks_are_trained_in_bfloat16_where_there_are_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(f"configs/bundled-{name}.toml")
    shape = LOW_SHAPE if name == "global" else config.data.patch_shape
    grid = config.stage_config(Scaling(), Scaling()).encode(torch.zeros(1, 2, *shape))
    for there, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("vtrial.precision.has_bfloat16", lambda device, there=there: there)
        assert dtype_for(config, grid) is dtype


@pytest.mark.parametrize(
    "path",
    sorted(path for path in Path("configs").glob("*.toml") if not path.stem.startswith(("analysis", "segmenter"))),
    ids=lambda p: p.stem,
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert read_config(path).steps > 0


def test_wrong_configurations_name_every_field(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('stage = "global"\nsteps = -1\nbach = 4\n[network]\nchannels = [8]\nblocks = [1]\n')
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert any("steps" in p for p in caught.value.problems) and any("bach" in p for p in caught.value.problems)
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "absent.toml")
    path.write_text("stage = ")
    with pytest.raises(InputError, match="not TOML"):
        read_config(path)


def test_data_without_subjects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"subjects\.parquet"):
        StoredVolumes(tmp_path)


def test_a_training_set_has_a_hash_of_who_is_in_it(data: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(data / "subjects.parquet")
    found = [data_sha256(data)]
    for changed in (
        table[::-1],
        table.assign(age_years=table["age_years"] + 1),
        table.assign(split="train"),
        table[1:],
    ):
        changed.to_parquet(tmp_path / "subjects.parquet")
        found.append(data_sha256(tmp_path))
    assert found[0] == found[1] and len(set(found)) == 4  # in another order it is the same set
    (tmp_path / "spec.csv").write_text("a")
    assert data_sha256(tmp_path / "spec.csv") == hashlib.sha256(b"a").hexdigest()


def test_export_writes_a_checked_model(data: Path, tmp_path: Path) -> None:
    runs = {stage: tmp_path / stage for stage in STAGES}
    for stage in STAGES:
        train(tiny(stage, steps=2), data, runs[stage])
    with (runs["global"] / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "err')  # a line cut off
    samplers = {stage: SamplerConfig(steps=4) for stage in STAGES}
    card = export_model(tmp_path / "model", runs, samplers, name="tiny", data="four blobs")
    assert read_card(tmp_path / "model") == card == verify_model(tmp_path / "model")
    stage = card.stages["global"]
    assert stage.data_sha256 == data_sha256(data) and [step for step, _ in stage.loss] == [2]
    told = {**stage.training, **stage.config.model_dump(mode="json", exclude={"scaling", "low_scaling", "band_sd"})}
    assert TrainingConfig.model_validate(told) == tiny("global", steps=2) and "network" not in stage.training
    assert read_card("phantom-v1").stages["global"].training == {}  # cards that do not tell are cards
    content = read_checkpoint(runs["global"] / "checkpoint.pt")
    weights = load_weights(tmp_path / "model" / stage.file, stage.sha256)
    average = content["ema"]["0.05"]
    for name, value in average.items():
        error, allowed = (weights[name].float() - value).abs(), torch.tensor(3e-3)
        if value.ndim == 5:
            # a kernel: half a step, of which an output's SD has 12, and its greatest weight 127 at most
            rows = value.flatten(1)
            allowed = 0.501 * torch.maximum(rows.std(1, correction=0) / 12, rows.abs().amax(1) / 127)
            allowed = allowed.view(-1, 1, 1, 1, 1)
        assert bool((error <= allowed).all()), name
    assert set(weights) == set(content["denoiser"])
    with pytest.raises(InputError, match="no average"):
        export_model(tmp_path / "m", runs, samplers, name="tiny", ema=0.2)
    with pytest.raises(InputError, match="super-resolution stage"):
        export_model(tmp_path / "m", {"global": runs["super-resolution"]}, samplers, name="tiny")

    file = tmp_path / "model" / stage.file
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(InputError) as caught:
        load_weights(file, stage.sha256)
    assert str(file) in str(caught.value) and stage.sha256 in str(caught.value) and "found" in str(caught.value)
    (tmp_path / "model" / card.stages["super-resolution"].file).unlink()
    with pytest.raises(InputError) as caught:
        verify_model(tmp_path / "model")
    assert len(caught.value.problems) == 2


def test_a_new_run_can_start_from_a_model(data: Path, tmp_path: Path) -> None:
    config = tiny("global", steps=40)
    train(config, data, tmp_path / "first")
    export_model(tmp_path / "model", {"global": tmp_path / "first"}, {"global": SamplerConfig(steps=4)}, name="tiny")
    train(config, data, tmp_path / "second", start_from=tmp_path / "model")
    scratch, warm = (losses(tmp_path / run)[0][1] for run in ("first", "second"))
    assert warm < 0.9 * scratch, "the first losses of a warm start are those of a trained network"
    with pytest.raises(InputError, match="super-resolution"):
        train(tiny("super-resolution", steps=2), data, tmp_path / "third", start_from=tmp_path / "model")


@pytest.mark.parametrize(("first", "second"), [("diffusion", "flow"), ("flow", "diffusion")])
def test_a_run_can_start_from_a_model_of_the_other_objective(
    first: str, second: str, data: Path, tmp_path: Path
) -> None:
    train(tiny("global", steps=40, objective=first), data, tmp_path / "first")
    export_model(tmp_path / "model", {"global": tmp_path / "first"}, {"global": SamplerConfig(steps=4)}, name="tiny")
    source, config = StoredVolumes(data), tiny("global", steps=3, objective=second)
    warm = warm_state(config, tmp_path / "model", source.support, source.device)
    card = read_card(tmp_path / "model").stages["global"]
    trained = load_denoiser(card.config, load_weights(tmp_path / "model" / card.file, card.sha256), torch.float32)
    example = make_batch(config, source, 1).part(0, 1, source.device)
    x = card.config.encode(example.target)
    shape = (x.shape[2], x.shape[3], x.shape[4])
    answers = []
    for denoiser in (trained, load_denoiser(warm.stage, warm.denoiser.state_dict(), torch.float32)):
        prepared = denoiser.network.prepare(example.conditions(card.config), shape, torch.float32)
        answers.append(denoiser(x, torch.tensor([0.7]), prepared))
    assert float((answers[0] - x).abs().max()) > 0.01
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-3)
    state = train(config, data, tmp_path / "second", start_from=tmp_path / "model")
    assert state.step == 3 and state.stage.objective == second


def test_a_run_of_another_version_is_told(data: Path, tmp_path: Path) -> None:
    config = tiny("global", steps=2)
    train(config, data, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content = read_checkpoint(path)
    then = json.loads(content["config"])
    then["data"]["low_noise"] = 0.01
    torch.save(content | {"config": json.dumps(then)}, path)
    for use in (
        lambda: train(config, data, tmp_path / "run"),
        lambda: export_model(tmp_path / "m", {"global": tmp_path / "run"}, {"global": SamplerConfig()}, name="m"),
    ):
        with pytest.raises(InputError, match=r"another version of vtrial.*data\.low_noise"):
            use()


def test_a_voxel_head_can_be_added_to_a_trained_network(data: Path, tmp_path: Path) -> None:
    config = tiny("global", steps=40)
    train(config, data, tmp_path / "first")
    export_model(tmp_path / "model", {"global": tmp_path / "first"}, {"global": SamplerConfig(steps=4)}, name="tiny")
    head = config.model_copy(update={"network": config.network.model_copy(update={"voxel_channels": 8})})
    train(head, data, tmp_path / "head", start_from=tmp_path / "model")
    train(config, data, tmp_path / "none", start_from=tmp_path / "model")
    with_head, without = losses(tmp_path / "head"), losses(tmp_path / "none")
    assert with_head[0][1] == pytest.approx(without[0][1], rel=0.05), "it begins as it was"
    content = read_checkpoint(tmp_path / "head" / "checkpoint.pt")
    assert float(content["denoiser"]["network.voxel_head.exit.weight"].abs().max()) > 0.0, "and the head learns"


def test_a_voxel_head_can_be_trained_alone(data: Path, tmp_path: Path) -> None:
    plain = tiny("global", steps=6)
    config = tiny(
        "global",
        steps=6,
        network=plain.network.model_copy(update={"voxel_channels": 8}),
        trains="voxel-head",
        contrast_weight=4.0,
    )
    with pytest.raises(ValueError, match="voxel_channels"):
        tiny("global", trains="voxel-head")
    begun = new_state(
        config, measure_scaling(config, StoredVolumes(data)), StoredVolumes(data).support, torch.device("cpu")
    )
    before = {name: value.clone() for name, value in begun.denoiser.state_dict().items()}
    train(config, data, tmp_path / "run", max_seconds=0.0)
    train(config, data, tmp_path / "run")
    after = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["denoiser"]
    changed = {name for name, value in after.items() if not torch.allclose(value, before[name], rtol=3e-4)}  # norms
    assert changed and all(".voxel_head." in f".{name}" for name in changed)


def test_weights_of_the_papers_size_are_stored(tmp_path: Path) -> None:
    """Bundled ones are small (test_bundled_model); those of 78.8 M parameters are not."""
    kernel = torch.linspace(-1.0, 1.0, 80 * 10**6).view(80, 10**6, 1, 1, 1)
    digest = save_weights(tmp_path / "w.safetensors", {"a": kernel}, small=True)
    found = load_weights(tmp_path / "w.safetensors", digest)["a"].float()
    assert found.shape == kernel.shape and float((found - kernel).abs().max()) < 1 / 127


def test_kernels_take_six_bits_a_weight_and_keep_their_answer(tmp_path: Path) -> None:
    kernel = torch.randn(64, 96, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    kernel[0, 0, 0, 0, 0] = 40.0  # a rare, great weight is kept too
    weights = {"a": kernel, "b": torch.randn(8, 5), "c": torch.randn(3), "one": torch.full((2, 1, 1, 1, 1), -0.3)}
    digest = save_weights(tmp_path / "w.safetensors", weights, small=True)
    assert (tmp_path / "w.safetensors").stat().st_size < 0.75 * kernel.numel()
    found = load_weights(tmp_path / "w.safetensors", digest)
    assert set(found) == set(weights)
    error = (found["a"] - kernel).flatten(1)
    assert float(error[1:].square().mean().sqrt()) < 0.03 and float(error.abs().max()) < 40.0 / 127
    assert torch.equal(found["c"], weights["c"]) and torch.allclose(found["one"], weights["one"], rtol=0.01)


def test_a_tables_support_is_what_it_covers() -> None:
    people = [blob(i)[2] for i in range(6)]
    support = Support.of(people)
    assert support.sex == ("F", "M") and support.union(support) == support
    for name in ("age_years", "height_cm", "weight_kg"):
        values = [getattr(p, name) for p in people]
        assert getattr(support, name) == (min(values), max(values))
    bmi = [p.weight_kg / (p.height_cm / 100) ** 2 for p in people]
    assert support.bmi == pytest.approx((min(bmi), max(bmi)))


def test_phantoms_support_is_that_of_their_population(data: Path, tmp_path: Path) -> None:
    for name in ("subjects.parquet", "ct", "suv"):
        (tmp_path / name).symlink_to(data / name)
    assert StoredVolumes(tmp_path).support == StoredVolumes(data).support
    limits = support_of(read_spec(find_spec("phantom-training")))
    assert limits == Support((18, 95), (145, 205), (40, 150), (15, 50))
    (tmp_path / "manifest.json").write_text(json.dumps({"facts": {"support": asdict(limits)}}))
    assert StoredVolumes(tmp_path).support == limits


def test_muon_moves_matrices_along_all_directions_alike_and_adam_the_rest() -> None:
    torch.manual_seed(0)
    kernel, gain = torch.nn.Parameter(torch.randn(32, 16, 3, 3, 3)), torch.nn.Parameter(torch.zeros([]))
    optimizer = Optimizer([kernel, gain], is_matrix)
    optimizer.set_rates(0.005, 0.025)
    before = kernel.detach().clone()
    kernel.grad = torch.outer(torch.randn(32), torch.randn(432)).view_as(kernel) + 0.01 * torch.randn(kernel.shape)
    gain.grad = torch.tensor(3.0)
    optimizer.step()
    assert gain.item() == pytest.approx(-0.005, rel=1e-3)  # Adam's first step is the rate
    move = (kernel.detach() - before).flatten(1)
    singular = torch.linalg.svdvals(move)
    assert torch.linalg.svdvals(kernel.grad.flatten(1))[0] > 50 * torch.linalg.svdvals(kernel.grad.flatten(1))[1]
    assert singular[0] < 3 * singular[-1]
    assert move.square().mean().sqrt().item() == pytest.approx(0.2 * 0.025, rel=0.25)  # Adam's root mean square


def test_muon_steps_as_that_of_torch_and_takes_up_its_averages() -> None:
    shapes = [(32, 16, 3, 3, 3), (96, 32), (16, 64)]
    kernels = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    flat = [torch.nn.Parameter(torch.zeros(kernel.flatten(1).shape)) for kernel in kernels]
    ours, torchs = Muon(kernels), torch.optim.Muon(flat, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step() -> None:
        for optimizer in (ours, torchs):
            optimizer.param_groups[0]["lr"] = 0.03
        for kernel, matrix in zip(kernels, flat, strict=True):
            kernel.grad = torch.randn(kernel.shape)
            matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        torchs.step()  # type: ignore[no-untyped-call]

    torch.manual_seed(0)
    for _ in range(3):
        step()
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))  # checkpoints that torch's wrote
    for _ in range(3):
        step()
    for kernel, matrix in zip(kernels, flat, strict=True):
        assert (kernel.flatten(1) - matrix).norm() < 0.03 * matrix.norm()  # torch's has the precision of bfloat16


@pytest.mark.parametrize(("kernels", "precision"), [(False, torch.float32), (True, torch.bfloat16)])
def test_muon_multiplies_in_the_precision_the_machine_is_fast_in(
    kernels: bool, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtrial.precision.has_bfloat16", lambda device: kernels)
    assert orthogonal(torch.randn(16, 32)).dtype == precision


def test_the_rate_ramps_decays_and_cools_down() -> None:
    plain = OptimizerConfig(lr=0.01, ramp_steps=10, decay_after=100)
    assert plain.rate(5, 1000) == pytest.approx(0.005) and plain.rate(400, 1000) == pytest.approx(0.005)
    cooled = plain.model_copy(update={"cooldown": 0.25})
    assert cooled.rate(750, 1000) == pytest.approx(plain.rate(750, 1000))
    assert cooled.rate(876, 1000) == pytest.approx(plain.rate(876, 1000) / 2)
    assert 0.0 < cooled.rate(1000, 1000) < 0.01 * plain.rate(1000, 1000)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
def test_a_checkpoint_that_is_none_is_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": torch.arange(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "text": b"not a checkpoint", "empty": b"", "other": whole}[damage]
    )
    if damage == "other":  # a file of torch's, but another kind of object
        torch.save(Path("a"), path)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_checkpoint(path)
