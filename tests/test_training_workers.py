"""Several workers train as one: parts of a batch, sums of gradients, agreement. torch.distributed without Ray."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.blobs import tiny, write_blobs
from vtrial.training import Share, StoredVolumes, TrainingConfig, steps, train
from vtrial.training.batches import make_batch, measure_scaling
from vtrial.training.checkpoint import CHECKPOINT, new_state, read_checkpoint

MUON = {"lr": 0.02, "matrix_lr": 0.03, "ramp_steps": 5, "decay_after": 200}
CASES = {
    "stage 1, Muon": tiny("global", steps=20, optimizer=MUON),
    "stage 2, odd parts": tiny("super-resolution", steps=20, batch=5, data={"patch_shape": (16, 16, 32)}),
    "more workers than examples": tiny("super-resolution", steps=4, batch=1, data={"patch_shape": (16, 16, 32)}),
}


class Broken(StoredVolumes):
    """Its first subject's volume is not a number, which only the worker that draws it sees."""

    def draw_low(self, rng, epoch):  # type: ignore[no-untyped-def]
        low, phase, person = super().draw_low(rng, epoch)
        return (low * torch.nan if person == self.demographics[0] else low), phase, person


Result = dict[str, object]


def trained(config: TrainingConfig, source: StoredVolumes, share: Share) -> Result:
    state = new_state(config, measure_scaling(config, StoredVolumes(source.folder)), source.support, share.device)
    reports = list(steps(config, source, state, share=share))
    return {
        "losses": [r.loss for r in reports],
        "errors": [r.errors for r in reports],
        "skipped": [r.skipped for r in reports],
        "weights": {name: value.clone() for name, value in state.denoiser.state_dict().items()},
        "ema": {name: value.clone() for name, value in state.ema.averages[0.05].items()},
    }


def every_case(data: Path, share: Share) -> dict[str, Result]:
    found = {name: trained(config, StoredVolumes(data), share) for name, config in CASES.items()}
    broken = tiny("global", steps=6, batch=2, scaling={"center": (0.3, 0.1), "sd": (0.3, 0.1)})
    return found | {"not finite": trained(broken, Broken(data), share)}


def in_folder(data: Path, out: Path, share: Share) -> None:
    """All of `train`: an end by the clock of one worker alone, and the rest."""
    config = tiny("global", checkpoint_steps=5)
    train(config, data, out, share=share, max_seconds=0.0 if share.leads else 1e9)
    assert read_checkpoint(out / CHECKPOINT)["step"] == 1
    train(config, data, out, share=share)


def work(rank: int, world: int, folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    share = Share(rank, world)
    torch.save(every_case(data, share), folder / f"{rank}.pt")
    in_folder(data, folder / "run", share)
    dist.destroy_process_group()


def side_by_side(function: Callable[..., None], world: int, *arguments: object) -> None:
    """Run `function(rank, world, …)` in `world` processes."""
    spawn = mp.get_context("spawn")
    workers = [spawn.Process(target=function, args=(rank, world, *arguments)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * world


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs", 4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Where two workers have left what they found."""
    folder = tmp_path_factory.mktemp("pair")
    side_by_side(work, 2, folder, data)
    return folder


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, Result]:
    return every_case(data, Share())


@pytest.mark.parametrize("case", [*CASES, "not finite"])
def test_two_workers_train_as_one(case: str, pair: Path, alone: dict[str, Result]) -> None:
    first, second = (torch.load(pair / f"{rank}.pt", weights_only=True)[case] for rank in range(2))
    assert first["losses"] == pytest.approx(alone[case]["losses"], abs=1e-4, nan_ok=True)
    assert first["skipped"] == second["skipped"] == alone[case]["skipped"]
    assert any(first["skipped"]) == (case == "not finite") and not all(first["skipped"])
    for kind in ("weights", "ema"):
        for name, value in alone[case][kind].items():  # type: ignore[attr-defined]
            assert torch.equal(first[kind][name], second[kind][name]), "workers have the same bits"
            # Muon orthogonalises in bfloat16, which makes much of the last bits
            assert torch.allclose(first[kind][name], value, atol=5e-3), name
    if case != "not finite":
        assert torch.allclose(torch.tensor(first["errors"]), torch.tensor(alone[case]["errors"]), atol=1e-3)


def test_workers_end_together_and_one_writes(pair: Path, data: Path, tmp_path: Path) -> None:
    run = pair / "run"
    whole = train(tiny("global"), data, tmp_path)
    content = read_checkpoint(run / CHECKPOINT)
    assert content["step"] == whole.step == 12
    for name, value in whole.denoiser.state_dict().items():
        assert torch.allclose(content["denoiser"][name], value, atol=5e-3), name
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) and '"workers": 2' in lines[-1] and '"begun": 1' in lines[-1]


@pytest.mark.parametrize("stage", ["global", "super-resolution"])
def test_examples_and_noise_do_not_depend_on_the_parts(stage: str, data: Path) -> None:
    losses, source = [], StoredVolumes(data)
    for size in (6, 3, 1):
        config = tiny(stage, batch=6, microbatch=size, data={"patch_shape": (16, 16, 32)})
        state = new_state(config, measure_scaling(config, source), source.support, source.device)
        losses.append([r.loss for r in islice(steps(config, source, state), 4)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[2] == pytest.approx(losses[0], abs=1e-4)
    whole, part = make_batch(config, source, 3), make_batch(config, source, 3, range(3, 5))
    assert torch.equal(whole.target[3:5], part.target) and whole.origins[3:5] == part.origins
    assert not torch.equal(whole.target[0], whole.target[3])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_cover_a_batch_once(world: int) -> None:
    for count in range(12):
        parts = [Share(rank, world).of(count) for rank in range(world)]
        assert [i for part in parts for i in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
