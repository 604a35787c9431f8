"""Training a segmenter of our own: its grid is TotalSegmentator's, it learns, resumes exactly, exports what runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from vtrial.execution import CannotGoOn, Resources
from vtrial.imaging.files import centred_affine, nifti_bytes, nifti_from_bytes
from vtrial.organs import GROUPS
from vtrial.phantom import Phantom
from vtrial.records import InputError, PetCt, Subject
from vtrial.segmentation import home as homes
from vtrial.segmentation import read_segmenter_card, segmenter_plan
from vtrial.segmentation.card import Head, Intensity, read_segmenter
from vtrial.segmentation.fit import (
    SegmenterConfig,
    export_segmenter,
    finish_segmenter,
    judge,
    prepare_phantoms,
    read_segmenter_config,
    train_segmenter,
)
from vtrial.segmentation.fit.batches import augmented, make_batch, normalised, region_parts
from vtrial.segmentation.fit.config import AugmentConfig, NetworkConfig, OptimizerConfig
from vtrial.segmentation.fit.data import StoredPhantoms
from vtrial.segmentation.fit.finish import calibrated
from vtrial.segmentation.fit.grid import FULL, resample_ct, resample_labels, to_grid
from vtrial.segmentation.fit.judge import compared
from vtrial.segmentation.fit.loop import METRICS, read_checkpoint, region_loss
from vtrial.segmentation.fit.network import build, folded
from vtrial.segmentation.nnunet import dataset_json, plans_json

SPEC = Path(__file__).parents[1] / "cohorts" / "phantom-training.csv"
SHAPE, SPACING = (40, 40, 44), (5.0, 5.0, 5.3)
NETWORK = NetworkConfig(
    features=(8, 16), strides=((1, 1, 1), (2, 2, 2)), convolutions=(1, 1), decoder_convolutions=(1,)
)


def toy_config(**changes: Any) -> SegmenterConfig:
    values: dict[str, Any] = {
        "name": "toy",
        "mode": "fastest",
        "heads": ("liver", "ribs"),
        "network": NETWORK,
        "intensity": Intensity(
            mean=-1000, std=300, percentile_00_5=-1000, percentile_99_5=800, min=-1024, max=1500, median=30
        ),
        "patch_size": (40, 40, 40),
        "median_shape": (39, 33, 33),
        "training_patch": (24, 24, 24),
        "optimizer": OptimizerConfig(lr=0.02, matrix_lr=0.02, ramp_steps=2),
        "ema": 0.8,
        "steps": 80,
        "precision": "float32",
        "metric_steps": 1,
        "checkpoint_steps": 100,
    }
    return SegmenterConfig(**{**values, **changes})


def toy(subject: Subject) -> Phantom:
    """A body with a bright liver somewhere and two bars of bone; what is where depends on the subject's number."""
    rng = np.random.default_rng(subject.index)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    ct = np.full(SHAPE, -1000.0)
    ct[4:-4, 6:-6, :] = 30.0
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    a, b, c = rng.uniform(14, 26, 3)
    labels[(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 < 70] = 5
    labels[6:9, 8:30, 4:40], labels[31:34, 8:30, 4:40] = 93, 104
    ct += 150.0 * (labels == 5) + 500.0 * (labels > 90) + rng.normal(0, 15, SHAPE)
    return Phantom(PetCt(ct.astype(np.int16), np.zeros(SHAPE, np.float32), SPACING), labels, {})


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setattr(homes, "sessions_folder", lambda: temporary)
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantoms(toy_config(), SPEC, tmp_path_factory.mktemp("fit") / "set", 4, 1, make=toy)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "run"
    torch.set_num_threads(1)
    train_segmenter(toy_config(), data, folder)
    return folder


# the grid


def rough_ct(seed: int, shape: tuple[int, int, int] = (37, 30, 52)) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 900, shape).astype(np.int16)


@pytest.mark.parametrize("grid_mm", [3.0, 6.0])
def test_the_grid_is_that_of_totalsegmentator_and_nnunet(tmp_path: Path, grid_mm: float) -> None:
    resampling = pytest.importorskip("totalsegmentator.resampling")
    import nibabel

    spacing = (2.0, 2.1, 1.7543)
    ct = rough_ct(0)
    image = nibabel.Nifti1Image(ct.astype(np.float64), centred_affine(ct.shape, spacing))
    theirs = resampling.change_spacing(image, grid_mm, order=1, dtype=np.int32, nr_cpus=1)
    ours = resample_ct(ct, spacing, grid_mm)
    np.testing.assert_array_equal(ours, np.asarray(theirs.dataobj))

    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    mode = "fast" if grid_mm == 3.0 else "fastest"
    config = toy_config(mode=mode)
    card = export_card(config)
    nibabel.save(theirs, tmp_path / "s01_0000.nii.gz")
    plans = PlansManager(plans_json(card))
    seen, _, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(tmp_path / "s01_0000.nii.gz")], None, plans, plans.get_configuration("3d_fullres"), dataset_json(card)
    )
    case = to_grid(ct, np.zeros(ct.shape, np.uint8), spacing, grid_mm)
    np.testing.assert_allclose(
        normalised(config, torch.from_numpy(case.ct.astype(np.float32))).numpy(), np.asarray(seen)[0], atol=1e-5
    )


def export_card(config: SegmenterConfig) -> Any:
    from vtrial.segmentation import SegmenterCard
    from vtrial.segmentation.fit.network import architecture

    return SegmenterCard(
        name="toy",
        training_data="none",
        phantoms_only=True,
        mode=config.mode,
        heads=config.regions,
        patch_size=config.patch_size,
        median_shape=config.median_shape,
        intensity=config.intensity,
        architecture=architecture(config.network),
    )


def test_parts_of_voxels_are_those_of_linear_interpolation() -> None:
    labels = (np.random.default_rng(2).random((21, 18, 25)) < 0.4).astype(np.uint8) * 7
    shape = (14, 12, 19)
    label, other, share = resample_labels(labels, shape)
    zoom = np.array(shape) / np.array(labels.shape)
    expected = ndimage.zoom((labels == 7).astype(np.float64), zoom, order=1, mode="nearest")
    part = np.where(label == 7, share / FULL, 0) + np.where((other == 7) & (label != 7), 1 - share / FULL, 0)
    np.testing.assert_allclose(part, expected, atol=0.5 / FULL + 1e-6)
    assert (share < FULL).mean() > 0.2 and share.min() >= FULL // 2


def test_regions_are_unions_and_parts_add_up() -> None:
    phantom = toy(Subject("a", 0, 0, "F", 50, 160, 60))
    case = to_grid(phantom.pet_ct.ct_hu, phantom.labels, SPACING, 6.0)
    config = toy_config()
    parts = region_parts(config, case).numpy()
    assert parts.shape == (2, *case.ct.shape) and case.ct.shape == (39, 33, 33)
    for head, part in zip(config.regions, parts):
        truth = np.isin(phantom.labels, head.covers).mean()
        assert part.mean() == pytest.approx(truth, rel=0.1) and truth > 0
    assert config.regions[1].covers == GROUPS["ribs"] and config.regions[1].writes == 92


# the stored set


def test_a_set_grows_resumes_and_refuses_strangers(tmp_path: Path) -> None:
    made: list[int] = []
    counted: list[int] = []

    def make(subject: Subject) -> Phantom:
        made.append(subject.index)
        return toy(subject)

    folder = prepare_phantoms(toy_config(), SPEC, tmp_path / "set", 2, 1, make=make)
    first = {path.name: path.read_bytes() for path in folder.glob("*.npz")}
    (folder / "00000.npz").unlink()
    prepare_phantoms(toy_config(), SPEC, folder, 3, 1, make=make)
    assert made == [0, 1, 0, 2]
    prepare_phantoms(toy_config(), SPEC, folder, 4, 1, make=make, progress=counted.append)
    assert counted == [4]
    with np.load(folder / "00000.npz") as again:
        (tmp_path / "old.npz").write_bytes(first["00000.npz"])
        with np.load(tmp_path / "old.npz") as old:
            assert all(np.array_equal(again[name], old[name]) for name in ("ct", "label", "other", "share"))
    with pytest.raises(InputError, match=r"another set.*seed"):
        prepare_phantoms(toy_config(), SPEC, folder, 3, 2, make=make)
    with pytest.raises(InputError, match="grid_mm"):
        prepare_phantoms(toy_config(mode="fast"), SPEC, folder, 3, 1, make=make)
    with pytest.raises(InputError, match=r"grid of 6\.0 mm"):
        StoredPhantoms(folder, 3.0)
    with pytest.raises(InputError, match=r"set\.json"):
        train_segmenter(toy_config(), tmp_path, tmp_path / "run")
    (folder / "00001.npz").write_bytes(b"torn")
    with pytest.raises(InputError, match="delete it"):
        for step in range(1, 20):
            make_batch(toy_config(), StoredPhantoms(folder, 6.0), StoredPhantoms(folder, 6.0).files, step)


def test_batches_depend_on_seed_and_step_alone(data: Path) -> None:
    source = StoredPhantoms(data, 6.0)
    a, b, c = (make_batch(toy_config(), source, source.files, step) for step in (3, 3, 4))
    assert torch.equal(a.image, b.image) and torch.equal(a.regions, b.regions) and not torch.equal(a.image, c.image)
    assert a.image.shape == (2, 1, 24, 24, 24) and a.regions.shape == (2, 2, 24, 24, 24)
    large = make_batch(toy_config(training_patch=(48, 40, 40)), source, source.files, 1)
    assert large.image.shape == (2, 1, 48, 40, 40) and float(large.regions[:, :, -1].max()) == 0.0


def test_augmentation_changes_what_it_says(data: Path) -> None:
    source = StoredPhantoms(data, 6.0)
    case = source.draw(source.files, np.random.default_rng(0), (24, 24, 24))
    none = AugmentConfig(tissue_hu=0, noise_hu=0, blur_mm=0)
    same = augmented(none, case, np.random.default_rng(1), 6.0)
    np.testing.assert_array_equal(same.numpy(), case.ct.astype(np.float32))
    shifted = augmented(none.model_copy(update={"tissue_hu": 20.0}), case, np.random.default_rng(1), 6.0) - same
    for label in (0, 93):
        inside = torch.from_numpy((case.label == label) & (case.ct > -800))
        assert shifted[inside].std() < 1e-4 and shifted[inside].abs().max() > 0
    assert shifted[torch.from_numpy(case.ct < -800)].abs().max() == 0
    blurred = [augmented(none.model_copy(update={"blur_mm": 9.0}), case, np.random.default_rng(s), 6.0) for s in (0, 3)]
    noisy = augmented(none.model_copy(update={"noise_hu": 50.0}), case, np.random.default_rng(1), 6.0)
    assert (noisy - same).std() > 5
    assert min(float(b.diff(dim=0).abs().mean()) for b in blurred) < 0.9 * float(same.diff(dim=0).abs().mean())


# training


def test_it_learns(run: Path) -> None:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert lines[-1]["loss"] < 0.4 * lines[0]["loss"]
    assert min(lines[-1]["dice"].values()) > 0.75 and max(lines[0]["dice"].values()) < 0.6


def test_an_interrupted_training_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    config = toy_config(steps=6, metric_steps=1)
    train_segmenter(config, data, tmp_path / "whole")
    train_segmenter(config, data, tmp_path / "cut", max_seconds=0.0)
    assert read_checkpoint(tmp_path / "cut")[1].step == 1
    with (tmp_path / "cut" / METRICS).open("a") as stream:
        stream.write('{"step": 2, "loss": 9}\n{"step": 3, "lo')
    train_segmenter(config, data, tmp_path / "cut")
    (_, a), (_, b) = (read_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    for name, value in a.average.state(a.network).items():
        assert torch.equal(value, b.average.state(b.network)[name]), name
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / METRICS).read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    with pytest.raises(InputError, match="another configuration"):
        train_segmenter(toy_config(steps=6, ema=0.5), data, tmp_path / "cut")
    with pytest.raises(InputError, match="resume it"):
        train_segmenter(config, data, tmp_path / "cut", resume=False)
    (tmp_path / "cut" / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        train_segmenter(config, data, tmp_path / "cut")


def test_a_training_that_skips_every_step_ends(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, dice = region_loss(*arguments)
        return loss * torch.nan, dice

    monkeypatch.setattr("vtrial.segmentation.fit.loop.region_loss", broken)
    with pytest.raises(CannotGoOn, match="20 steps were skipped"):
        train_segmenter(toy_config(metric_steps=5), data, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines] == [(5, 5), (10, 10), (15, 15), (20, 20)]
    assert not any("loss" in line or "dice" in line for line in lines)


def test_grids_on_which_bfloat16_is_wrong_are_refused() -> None:
    assert toy_config(training_patch=(4, 24, 24)).precision == "float32"
    assert toy_config(training_patch=(6, 24, 24), precision="bfloat16").steps
    with pytest.raises(ValueError, match="training_patch: its coarsest grid"):
        toy_config(training_patch=(4, 24, 24), precision="bfloat16")


def test_the_loss_is_least_where_outputs_equal_soft_targets() -> None:
    target = torch.rand(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    at = [float(region_loss(torch.logit(target.clamp(0.01, 0.99)) + o, target, 1.0)[0]) for o in (-0.5, 0.0, 0.5)]
    assert at[1] < min(at[0], at[2])
    absent = torch.zeros(1, 2, 4, 4, 4)
    _, dice = region_loss(absent, absent, 1.0)
    assert bool(torch.isnan(dice).all())


def test_folding_the_normalisation_changes_no_output() -> None:
    network = build(NETWORK, 3, normalise=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(value + torch.rand(value.shape, generator=generator))
    plain = build(NETWORK, 3, normalise=False)
    plain.load_state_dict(folded(NETWORK, 3, network.state_dict()))
    image = torch.randn(1, 1, 8, 8, 8, generator=generator)
    with torch.no_grad():
        expected, found = network.eval()(image), plain.eval()(image)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# the finished segmenter


def test_an_export_runs_in_totalsegmentator_and_offsets_grow_regions(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("totalsegmentator")
    config, _ = read_checkpoint(run)
    unseen = [toy(Subject("b", 100, 0, "F", 50, 160, 60))]
    ratios = []
    for offset in (0.0, 1.0):
        folder = tmp_path / f"toy{offset:g}"
        card = export_segmenter(run, folder, offsets={"liver": offset}, dice={"liver": 0.5}, description="a toy")
        segment = segmenter_plan(str(folder), cache=tmp_path / "cache").load(Resources(threads=1))
        found = judge(segment, unseen, config.regions)
        ratios.append(found.volume["liver"][0])
        if not offset:
            assert found.mean_dice["liver"] > 0.75 and found.mean_dice["ribs"] > 0.6
    assert ratios[1] > 1.05 * ratios[0]
    assert card == read_segmenter_card(folder) and card.phantoms_only and card.organs == ("liver",)
    assert card.training_data == "4 phantoms of phantom-training.csv, seed 1; 80 steps of 2"
    _, weights = read_segmenter(folder)
    assert not [name for name in weights if "norm" in name or "running" in name]


def test_finishing_calibrates_judges_and_writes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("totalsegmentator")
    asked = []

    def held_out(spec: Path, n: int, seed: int) -> Iterator[Phantom]:
        asked.append((n, seed))
        return (toy(Subject("c", 100 * seed + i, seed, "F", 50, 160, 60)) for i in range(n))

    monkeypatch.setattr("vtrial.segmentation.fit.finish.held_out", held_out)
    told: list[tuple[str, int]] = []
    card, found = finish_segmenter(
        run, tmp_path / "out", SPEC, seed=7, calibrate_on=1, judge_on=2, rounds=1, progress=lambda *t: told.append(t)
    )
    assert asked == [(1, 7), (2, 8)] and told == [
        ("calibrating", 1),
        ("calibrating", 1),
        ("judging", 1),
        ("judging", 2),
    ]
    assert card == read_segmenter_card(tmp_path / "out") and card.dice["liver"] == round(found.mean_dice["liver"], 4)
    assert card.volume_bias["ribs"] == pytest.approx(100 * np.mean(found.volume["ribs"]) - 100, abs=0.01)
    assert set(card.volume_bias) == {"liver", "ribs"} and 0 < max(map(abs, card.volume_bias.values())) < 60
    assert len(found.seconds) == 2 and found.mean_dice["liver"] > 0.6
    export_segmenter(run, tmp_path / "plain")
    (_, calibrated_weights), (_, plain) = read_segmenter(tmp_path / "out"), read_segmenter(tmp_path / "plain")
    moved = [name for name in plain if not torch.equal(plain[name], calibrated_weights[name])]
    assert moved == ["decoder.seg_layers.0.bias"]


def test_judging_counts_voxels_by_head_and_sum() -> None:
    heads = [Head(name=f"kidney_{side}", covers=(i,), writes=i) for side, i in (("right", 2), ("left", 3))]
    heads.append(Head(name="ribs", covers=GROUPS["ribs"], writes=92))
    assert set(compared(heads)) == {"kidney_right", "kidney_left", "ribs", "kidneys"}
    labels = np.zeros((10, 10, 10), dtype=np.uint8)
    labels[:4, 0], labels[6:, 0], labels[:, 5] = 2, 3, 100
    mask = labels.copy()
    mask[mask == 100] = 92
    mask[2:4, 0] = 3  # half of one kidney taken for the other
    mask[0, 9] = 92
    phantom = Phantom(PetCt(np.zeros(labels.shape, np.int16), np.zeros(labels.shape, np.float32), SPACING), labels, {})

    def segment(ct: bytes) -> bytes:
        assert nifti_from_bytes(ct, "ct")[0].shape == labels.shape
        return nifti_bytes(mask, SPACING)[0]

    found = judge(segment, [phantom, phantom], heads)
    assert found.dice["kidney_right"] == pytest.approx((2 / 3, 2 / 3))
    assert found.dice["kidney_left"][0] == pytest.approx(2 * 40 / 100)
    assert found.mean_dice["kidneys"] == 1.0 and found.volume_bias["kidneys"] == 0.0
    assert found.volume_bias["kidney_left"] == pytest.approx(0.5) and found.volume_bias["ribs"] == pytest.approx(0.1)
    mask[mask == 3], labels[labels == 3] = 0, 0
    found = judge(segment, [phantom], heads)
    assert np.isnan(found.mean_dice["kidney_left"]) and np.isnan(found.volume_bias["kidney_left"])


def test_offsets_are_found_at_which_volumes_have_no_bias() -> None:
    slopes = {"liver": 0.05, "aorta": 0.3, "kidneys": 0.1}
    start = {"liver": -0.03, "aorta": 0.12, "kidneys": -0.02}
    asked: list[Mapping[str, float]] = []

    def bias_of(offsets: Mapping[str, float]) -> Mapping[str, float]:
        asked.append(offsets)
        found = {name: start[name] + slope * offsets.get(name, 0.0) for name, slope in slopes.items()}
        return {**found, "stuck": 0.01 + abs(offsets.get("stuck", 0.0)), "absent": float("nan")}

    offsets = calibrated(bias_of, rounds=2)
    assert len(asked) == 3 and "absent" not in offsets
    for name in slopes:
        assert bias_of(offsets)[name] == pytest.approx(0.0, abs=1e-9)
    assert offsets["stuck"] == 0.0


# configurations


def test_the_shipped_configuration_draws_what_is_asked_of_it(repository: Path) -> None:
    config = read_segmenter_config(repository / "configs" / "segmenter-phantom-v1.toml")
    needed = ["liver", "spleen", "heart", "aorta", "pancreas", "stomach", "urinary_bladder", "sacrum", "ribs"]
    needed += [f"vertebrae_L{i}" for i in range(1, 6)]
    assert set(needed) < set(config.heads) and set(compared(config.regions)) >= {"kidneys", "lungs", "clavicles"}
    network = build(config.network, len(config.heads), normalise=False)
    size = sum(p.numel() for p in network.parameters()) * 2
    assert size < 4 * 2**20  # float16, far below the 16 MiB that a file may have


def test_bad_configurations_are_told(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\nmode = "total"\nheads = ["livver"]\nsurprise = 1\n')
    with pytest.raises(InputError) as caught:
        read_segmenter_config(path)
    told = str(caught.value)
    assert all(word in told for word in ("mode", "surprise", "network", "steps"))
    for changes, word in (
        ({"heads": ("livver",)}, "livver"),
        ({"training_patch": (24, 24, 25)}, "multiples"),
    ):
        with pytest.raises(ValueError, match=word):
            toy_config(**changes)
    with pytest.raises(ValueError, match="start with"):
        NetworkConfig(features=(8, 8), strides=((2, 2, 2),) * 2, convolutions=(1, 1), decoder_convolutions=(1,))
    with pytest.raises(InputError, match="cannot be read"):
        read_segmenter_config(tmp_path / "none.toml")
