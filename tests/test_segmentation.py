from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import multiprocessing
import multiprocessing.process
import os
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from vtrial.execution import CannotGoOn, LocalExecutor, Resources
from vtrial.imaging.files import nifti_bytes, nifti_from_bytes, voxel_sha256, write_nifti_atomic
from vtrial.organs import ORGAN_NAMES
from vtrial.records import InputError
from vtrial.runs import JOURNAL as RUN_JOURNAL
from vtrial.runs import JournalEntry, Manifest
from vtrial.segmentation import (
    Architecture,
    CtCase,
    Head,
    Intensity,
    SegmenterCard,
    SegmenterPlan,
    SegmentJournal,
    SegmentSummary,
    list_segmenters,
    read_segmenter_card,
    run_ct_cases,
    segment_cohort,
    segmenter_plan,
    write_segmenter,
)
from vtrial.segmentation import home as homes
from vtrial.segmentation.adapter import SMOOTH, LoadTotalSegmentator
from vtrial.segmentation.card import CARD, SPACING_MM, WEIGHTS, Mode, read_segmenter
from vtrial.segmentation.nnunet import (
    CHECKPOINT,
    DATASETS,
    STAMP,
    built_model,
    dataset_json,
    plans_json,
    trainer_folder,
    write_model,
)
from vtrial.segmentation.official import official_weights
from vtrial.segmentation.resident import installed, why_not_resident
from vtrial.storage import open_folder

SIDE, STEP_MM = 40, 6.0
ARGUMENTS: dict[str, Any] = {
    "n_stages": 2,
    "features_per_stage": [4, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [2, 2, 2]],
    "n_conv_per_stage": [1, 1],
    "n_conv_per_stage_decoder": [1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
CLASSES = ("conv_op", "norm_op", "dropout_op", "nonlin")
HEADS = (
    Head(name="liver", covers=(5,), writes=5),
    Head(name="lung_upper_lobe_left", covers=(10, 11), writes=10),
    Head(name="lung_lower_lobe_left", covers=(11,), writes=11),
    Head(name="heart", covers=(51,), writes=51),
    Head(name="ribs", covers=tuple(range(92, 116)), writes=92),
)


def tiny_network(outputs: int, *, background: bool = False) -> dict[str, torch.Tensor]:
    """Random weights of a small U-Net whose outputs sit near the threshold, so that every class appears.

    With `background` the first output is the highest in about half of the voxels.
    """
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    classes = {
        "conv_op": torch.nn.Conv3d,
        "norm_op": torch.nn.InstanceNorm3d,
        "dropout_op": None,
        "nonlin": torch.nn.LeakyReLU,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = unet.PlainConvUNet(
            input_channels=1, num_classes=outputs, deep_supervision=False, **{**ARGUMENTS, **classes}
        )
        with torch.no_grad():
            logits = net(torch.randn(1, 1, 32, 32, 32))[0].flatten(1)
            levels = torch.quantile(logits, 0.8, dim=1)
            net.decoder.seg_layers[-1].bias -= levels
            if background:
                above = (logits - levels[:, None])[1:].amax(0) - (logits[0] - levels[0])
                net.decoder.seg_layers[-1].bias[0] += torch.quantile(above, 0.5)
    weights: dict[str, torch.Tensor] = net.state_dict()
    return weights


def tiny_card(**changes: Any) -> SegmenterCard:
    values: dict[str, Any] = {
        "name": "tiny",
        "training_data": "none, random weights",
        "phantoms_only": True,
        "mode": "fastest",
        "heads": HEADS,
        "patch_size": (32, 32, 32),
        "median_shape": (40, 40, 40),
        "intensity": Intensity(
            mean=0, std=200, percentile_00_5=-900, percentile_99_5=800, min=-1024, max=2000, median=20
        ),
        "architecture": Architecture(
            network_class="dynamic_network_architectures.architectures.unet.PlainConvUNet",
            arguments=ARGUMENTS,
            requires_import=CLASSES,
        ),
    }
    return SegmenterCard(**{**values, **changes})


@pytest.fixture(autouse=True)
def nothing_left_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder of the test's own; a test that leaves anything in it or in the temporary folder fails."""
    home, temporary, cache = tmp_path / "home", tmp_path / "tmp", tmp_path / "cache"
    for folder in (home, temporary):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("MPLCONFIGDIR", str(cache))  # matplotlib, which totalsegmentator imports, makes it
    monkeypatch.setattr(homes, "sessions_folder", lambda: temporary)
    for name in ("TOTALSEG_WEIGHTS_PATH", "TOTALSEG_HOME_DIR", "nnUNet_results", "nnUNet_def_n_proc"):
        monkeypatch.delenv(name, raising=False)
    yield home
    assert list(home.iterdir()) == []
    if list(temporary.iterdir()):
        gc.collect()  # a segmenter takes its home along
    assert list(temporary.iterdir()) == []
    assert [name for name in os.environ if name.startswith("nnUNet")] == []


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenters") / "tiny"
    write_segmenter(folder, tiny_network(len(HEADS)), tiny_card())
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuses every connection to the outside and every look-up of a name, and remembers that someone tried."""
    tried: list[str] = []
    connect = socket.socket.connect

    def refuse(*arguments: Any, **unused: Any) -> Any:
        tried.append(str(arguments))
        raise OSError("no network in this test")

    def connect_inside(self: socket.socket, address: Any) -> None:
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", connect_inside)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    return tried


def blob_ct(seed: int = 0, side: int = SIDE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ct = np.full((side, side, side + 4), -1000, dtype=np.int16)
    ct[6:-6, 8:-8, 2:-2] = rng.normal(40, 120, (side - 12, side - 16, side)).astype(np.int16)
    return ct


def ct_bytes(seed: int = 0, affine: np.ndarray | None = None) -> bytes:
    """A CT, on a grid that is flipped, shifted and not isotropic unless told otherwise."""
    import nibabel

    if affine is None:
        affine = np.array([[-5.0, 0, 0, 90], [0, 6.0, 0, -70], [0, 0, 6.5, 12], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(blob_ct(seed), None)
    image.header.set_qform(None, code=0)
    image.header.set_sform(affine, code=1)
    data: bytes = nibabel.Nifti1Image(blob_ct(seed), None, image.header).to_bytes()
    return data


# the real package


def test_resident_masks_are_those_of_the_stock_path_and_nothing_calls_home(
    tiny_model: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = segmenter_plan(str(tiny_model))
    assert plan.phantoms_only and plan.organs == tuple(h.name for h in HEADS if h.name != "ribs")
    segment = plan.load(Resources(threads=1))
    assert segment.resident
    runner = segment._runner
    threads, loads = [], []
    for name, told in (
        ("predict_from_files_sequential", lambda: threads.append(torch.get_num_threads())),
        ("initialize_from_trained_model_folder", lambda: loads.append(1)),
    ):
        stock = getattr(runner.nnUNetPredictor, name)

        def spy(self: Any, *a: Any, _stock: Any = stock, _told: Callable[[], None] = told, **k: Any) -> Any:
            _told()
            return _stock(self, *a, **k)

        monkeypatch.setattr(runner.nnUNetPredictor, name, functools.wraps(stock)(spy))
    tiling = importlib.import_module("nnunetv2.inference.predict_from_raw_data")
    windows, compute = [], tiling.compute_gaussian
    spied = functools.wraps(compute)(lambda *a, **k: (windows.append(a), compute(*a, **k))[1])
    spied.cache_clear = compute.cache_clear
    monkeypatch.setattr(tiling, "compute_gaussian", spied)
    started = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "start", lambda process: (started.append(process.name), start(process))[1]
    )
    cts = [ct_bytes(0), ct_bytes(1)]
    masks = [segment(ct) for ct in [*cts, cts[0]]]
    assert threads == [1, 1, 1] and loads == [1] and started == []
    assert len(windows) == 1 and tiling.compute_gaussian is spied  # kept, and put back
    assert no_network == [] and not any(name.startswith("TOTALSEG") for name in os.environ)
    assert [path.name for path in segment._home.folder.iterdir()] == ["config.json"]  # no volume is left
    threads.clear()
    stock_segment = LoadTotalSegmentator("fastest", model=str(tiny_model), resident=False)(Resources(threads=1))
    expected, affine = nifti_from_bytes(stock_segment(cts[0]), "stock")
    ours, our_affine = nifti_from_bytes(masks[0], "ours")
    assert ours.dtype == np.uint8 and ours.shape == blob_ct().shape
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(our_affine, affine)
    np.testing.assert_allclose(our_affine, nifti_from_bytes(cts[0], "ct")[1])
    assert masks[2] == masks[0] and masks[1] != masks[0]
    assert threads == [] and loads == [1, 1] and started  # the other path was another indeed
    assert no_network == []
    assert len(np.unique(ours)) >= 5 and set(np.unique(ours)) <= {0, *(h.writes for h in HEADS)}


def test_masks_of_our_own_segmenters_come_back_smoothly_and_official_ones_as_they_do(
    tiny_model: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resample_one_hot_crop = pytest.importorskip("totalsegmentator.resampling").resample_one_hot_crop
    own = segmenter_plan(str(tiny_model)).load(Resources(threads=1))
    official = LoadTotalSegmentator("fastest", weights=str(built_model(tiny_model)))(Resources(threads=1))
    drawn: list[np.ndarray] = []  # by the network, on its own grid
    stock = own._runner.change_spacing

    def told(image: Any, *arguments: Any, **options: Any) -> Any:
        if options["dtype"] is np.uint8:
            drawn.append(np.asarray(image.dataobj))
        return stock(image, *arguments, **options)

    monkeypatch.setattr(own._runner, "change_spacing", told)
    ct = nifti_bytes(blob_ct(), (4.0, 4.0, 4.0))[0]
    smooth, nearest = (nifti_from_bytes(segment(ct), "mask")[0] for segment in (own, official))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len(np.unique(drawn[0])) >= 5
    np.testing.assert_array_equal(smooth, resample_one_hot_crop(drawn[0], smooth.shape, order=1))
    zoom = np.array(nearest.shape) / np.array(drawn[1].shape)
    np.testing.assert_array_equal(nearest, ndimage.zoom(drawn[1], zoom, order=0, mode="nearest"))
    assert (smooth != nearest).mean() > 0.01


def test_a_totalsegmentator_without_smooth_masks_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = segmenter_plan(str(tiny_model))
    assert plan.facts["options"] == [SMOOTH]
    with monkeypatch.context() as without:
        without.setattr("vtrial.segmentation.choice.SMOOTH", "nearest")
        assert segmenter_plan(str(tiny_model)).sha256 != plan.sha256  # other masks are another segmenter's
    monkeypatch.setattr(f"{LoadTotalSegmentator.__module__}.SMOOTH", "smoothest")
    with pytest.raises(InputError, match=r"no option smoothest, .* 2\.15 or newer"):
        plan.load(Resources(threads=1))
    monkeypatch.setattr("vtrial.segmentation.resident.totalsegmentator_version", lambda: "2.14.0")
    monkeypatch.setattr("vtrial.segmentation.choice.totalsegmentator_version", lambda: "2.14.0")
    with pytest.raises(InputError, match=rf"totalsegmentator 2\.14\.0 has no option {SMOOTH}"):
        segmenter_plan(str(tiny_model))
    with pytest.raises(InputError, match="no such folder"):  # for the official weights it would do
        segmenter_plan("totalsegmentator", weights="nowhere")


def test_the_trap_for_network_calls_springs(no_network: list[str]) -> None:
    requests = pytest.importorskip("requests")
    with pytest.raises(requests.exceptions.RequestException):
        requests.post("https://stats.example.org", timeout=1)
    assert no_network


def test_weights_that_vanish_during_a_run_end_it(tiny_model: Path, tmp_path: Path, no_network: list[str]) -> None:
    cache = tmp_path / "models"
    segment = segmenter_plan(str(tiny_model), cache=cache).load(Resources())
    shutil.rmtree(cache)
    with pytest.raises(InputError, match="weights are gone"):
        segment(ct_bytes())
    assert no_network == []


def test_an_unknown_totalsegmentator_keeps_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Predictor:
        def predict_from_files_sequential(self) -> None: ...
        def initialize_from_trained_model_folder(self) -> None: ...

    class Runner:
        nnUNetPredictor = Predictor

        @staticmethod
        def get_output_folder() -> None: ...

        @staticmethod
        def nnUNetv2_predict(
            dir_in, dir_out, task_id, model, folds, trainer, tta, plans, device, step_size
        ) -> None: ...  # type: ignore[no-untyped-def]

    assert why_not_resident(Runner) == ""
    monkeypatch.setattr("vtrial.segmentation.resident.totalsegmentator_version", lambda: "3.1.0")
    assert "3.1.0" in why_not_resident(Runner)
    monkeypatch.setattr("vtrial.segmentation.resident.totalsegmentator_version", lambda: "2.99.0")
    Runner.nnUNetv2_predict = staticmethod(lambda dir_in, surprise: None)  # type: ignore[assignment]
    assert "surprise" in why_not_resident(Runner)


def test_what_the_stock_path_forks_can_be_ended_whatever_handles_signals_here(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    codes = []
    with (tmp_path / "dump").open("w") as dump:
        faulthandler.register(signal.SIGTERM, file=dump)  # below Python, as Ray's is; the process lives on
        try:
            for stock in (True, False):
                with installed(SimpleNamespace(nnUNetv2_predict=None), None) if stock else contextlib.nullcontext():
                    child = fork.Process(target=time.sleep, args=(60,))
                    child.start()
                child.terminate()
                child.join(2 if not stock else 30)
                codes.append(child.exitcode)
                child.kill()
                child.join()
        finally:
            faulthandler.unregister(signal.SIGTERM)
    assert codes == [-signal.SIGTERM, None]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "held back for the fork alone"


@pytest.mark.slow
def test_117_classes_through_both_paths(tmp_path: Path, no_network: list[str]) -> None:
    weights = official_layout(tmp_path / "weights", tiny_network(118))
    plan = segmenter_plan("totalsegmentator", mode="fastest", weights=weights)
    assert plan.name == "totalsegmentator-fastest" and plan.organs is None and not plan.phantoms_only
    ct = ct_bytes()
    ours, _ = nifti_from_bytes(plan.load(Resources(threads=1))(ct), "ours")
    assert no_network == []
    stock = replace(plan.load, resident=False)(Resources(threads=1))
    np.testing.assert_array_equal(ours, nifti_from_bytes(stock(ct), "stock")[0])
    assert len(np.unique(ours)) > 20


@pytest.mark.slow
def test_the_five_models_of_the_full_resolution_stay_resident(tmp_path: Path, no_network: list[str]) -> None:
    parts = pytest.importorskip("totalsegmentator.map_to_binary").class_map_5_parts
    for number, part in enumerate(list(parts.values())[:5]):
        names = [part[label] for label in sorted(part)]
        official_layout(tmp_path / "weights", tiny_network(len(names) + 1, background=True), "total", number, names)
    segment = segmenter_plan("totalsegmentator", weights=tmp_path / "weights").load(Resources(threads=1))
    ct = nifti_bytes(blob_ct(0, 20), (4.0, 4.0, 4.0))[0]
    masks = [segment(ct) for _ in range(2)]
    assert masks[0] == masks[1] and len(segment._stand_in._loaded) == 5 and no_network == []
    found = set(np.unique(nifti_from_bytes(masks[0], "mask")[0]))
    ids = {name: label for label, name in ORGAN_NAMES.items()}
    drawn = [part for part in parts.values() if found & {ids.get(name) for name in part.values()}]
    assert len(drawn) >= 3  # later parts are drawn over earlier ones


# official weights


def official_layout(
    weights: Path,
    network: dict[str, torch.Tensor],
    mode: Mode = "fastest",
    number: int = 0,
    names: Sequence[str] = tuple(ORGAN_NAMES.values()),
) -> Path:
    """A model with the classes `names` where TotalSegmentator has the one with this number of a mode."""
    labels = {"background": 0, **{name: label for label, name in enumerate(names, start=1)}}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    plans = plans_json(tiny_card())
    plans["configurations"]["3d_fullres"]["spacing"] = [SPACING_MM[mode]] * 3
    folder = weights / DATASETS[mode][number] / trainer_folder(mode)
    write_model(folder, mode, dataset, plans, network)
    return weights


def test_missing_weights_are_told_before_anything_runs(
    tmp_path: Path, nothing_left_at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError) as caught:
        segmenter_plan("totalsegmentator", mode="fast")
    told = str(caught.value)
    for part in (
        str(nothing_left_at_home / ".totalsegmentator/nnunet/results"),
        DATASETS["fast"][0],
        "totalseg_download_weights -t total_fast",
        "TOTALSEG_WEIGHTS_PATH",
    ):
        assert part in told
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "a"))
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "b"))
    with pytest.raises(InputError) as caught:
        segmenter_plan("totalsegmentator")
    for part in (str(tmp_path / "a"), str(tmp_path / "b/nnunet/results"), "-t total`"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match=r"--weights: .*nowhere: no such folder"):
        segmenter_plan("totalsegmentator", weights=tmp_path / "nowhere")


def test_weights_are_found_where_totalsegmentator_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = official_layout(tmp_path / "b/nnunet/results", {"w": torch.zeros(1)})
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "b"))
    assert official_weights("fastest") == weights
    (weights / DATASETS["fastest"][0] / trainer_folder("fastest") / CHECKPOINT).write_bytes(b"")
    with pytest.raises(InputError, match="interrupted download"):
        official_weights("fastest")


def test_a_model_of_ours_never_passes_for_the_official_one(tiny_model: Path, tmp_path: Path) -> None:
    place = built_model(tiny_model, tmp_path / "models")
    with pytest.raises(InputError, match="vtrial's own"):
        official_weights("fastest", place)


# segmenters of our own


def test_segmenters_survive_the_disk_and_are_checked(tiny_model: Path, tmp_path: Path) -> None:
    card, weights = read_segmenter(tiny_model)
    expected = tiny_network(len(HEADS))
    assert weights.keys() == expected.keys() and card.parameters < sum(v.numel() for v in expected.values())
    for name, value in expected.items():
        assert torch.equal(weights[name], value.half().float() if value.ndim > 1 else value)
    assert len({value.data_ptr() for value in weights.values()}) == len(weights)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="not those of the card"):
        segmenter_plan(str(copy))
    known = json.loads((copy / CARD).read_text())
    (copy / CARD).write_text(json.dumps({**known, "mode": "slow", "surprise": 1}))
    with pytest.raises(InputError) as caught:
        read_segmenter_card(copy)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": (Head(name="liver", covers=(5,), writes=5),)},
        {"heads": (*HEADS, HEADS[0])},
        {"name": "../elsewhere"},
    ],
)
def test_cards_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        tiny_card(**changes)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Head, {"name": "liver", "covers": (5, 6), "writes": 6}),
        (Head, {"name": "liver", "covers": (118,), "writes": 118}),
        (Head, {"name": "gills", "covers": (5,), "writes": 5}),
        (Architecture, {"network_class": "os.system", "arguments": {}}),
        (
            Architecture,
            {
                "network_class": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arguments": {"conv_op": "os.system"},
                "requires_import": ("conv_op",),
            },
        ),
    ],
)
def test_heads_and_networks_that_cannot_be_are_refused(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        kind(**values)


def test_unknown_segmenters_and_options_that_do_not_fit(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="no such bundled segmenter"):
        segmenter_plan("phantom-v99")
    with pytest.raises(InputError, match="--fast"):
        segmenter_plan(str(tiny_model), mode="fast")
    assert "phantom-v99" not in list_segmenters()
    load = segmenter_plan(str(tiny_model)).load
    assert pickle.loads(pickle.dumps(load)) == load != load.in_session("another")  # it travels to workers


def test_models_are_built_once_whole_and_by_many_at_once(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models"
    with ThreadPoolExecutor(6) as pool:
        places = list(pool.map(lambda _: built_model(tiny_model, cache), range(6)))
    assert len(set(places)) == 1 and [p.name for p in cache.iterdir()] == [places[0].name]
    checkpoint = places[0] / DATASETS["fastest"][0] / trainer_folder("fastest") / CHECKPOINT
    whole, written = checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns
    assert built_model(tiny_model, cache) == places[0] and checkpoint.stat().st_mtime_ns == written
    checkpoint.write_bytes(whole[:100])
    assert built_model(tiny_model, cache) == places[0] and len(checkpoint.read_bytes()) == len(whole)
    assert [p.name for p in cache.iterdir()] == [places[0].name]
    stamp = json.loads((checkpoint.parents[1] / "dataset.json").read_text())
    assert stamp == json.loads(json.dumps(dataset_json(read_segmenter_card(tiny_model))))
    assert stamp[STAMP]["phantoms_only"] and stamp["labels"]["lung_upper_lobe_left"] == [10, 11]
    assert stamp["regions_class_order"] == [5, 10, 11, 51, 92]


def test_a_cache_that_cannot_be_written_is_told(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        built_model(tiny_model, tmp_path / "file")


def test_homes_that_others_left_are_swept_and_those_at_work_kept(tmp_path: Path) -> None:
    left, busy = homes.make_home("vtrial-segment-a", tmp_path, 1), homes.make_home("vtrial-segment-b", tmp_path, 1)
    left.lock.close()
    long_ago = time.time() - 3600
    for home in (left, busy):
        os.utime(home.folder.parent, (long_ago, long_ago))
    homes.sweep_sessions()
    assert not left.folder.exists() and busy.folder.exists()
    homes.end_session("vtrial-segment-b")
    busy.lock.close()


# many subjects


@dataclass(frozen=True)
class LoadThreshold:
    """Bone is class 1 and the rest of the body 5; a CT whose first voxel is 7 is more than it can take."""

    session: str = ""

    def in_session(self, session: str) -> LoadThreshold:
        return LoadThreshold(session)

    def __call__(self, resources: Resources) -> Callable[[bytes], bytes]:
        homes.make_home(self.session, Path.cwd(), 1)

        def segment(ct: bytes) -> bytes:
            hu, affine = nifti_from_bytes(ct, "ct")
            if hu.flat[0] == 7:
                raise ArithmeticError("too much")
            labels = (np.where(hu > 100, 1, 5) * (hu > -300)).astype(np.uint8)
            spacing = tuple(float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))
            return nifti_bytes(labels, spacing)[0]

        return segment


def threshold_plan(name: str = "threshold", sha256: str = "1") -> SegmenterPlan:
    return SegmenterPlan(name, sha256, LoadThreshold(), phantoms_only=True, facts={"mode": "fast"})


def write_run(folder: Path, n: int, *, truth: bool = False, sharded: bool = False) -> None:
    """A finished run of n subjects as `vtrial generate` leaves it."""
    manifest = Manifest(kind="twins", identity={}, geometry={}, n=n, sharded=sharded)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    lines = []
    for i in range(n):
        name = f"scans/P{i}/CTres.nii.gz"
        row = {"ct_path": name, "ct_sha256": write_nifti_atomic(folder / name, blob_ct(i, 20), (4.0, 4.0, 4.0))}
        if truth:
            row["segmentation_path"] = f"segmentations/P{i}.nii.gz"
            write_nifti_atomic(folder / row["segmentation_path"], np.ones((20, 20, 24), np.uint8), (4.0, 4.0, 4.0))
        lines.append(JournalEntry(time="", status="ok", subject_id=f"P{i}", index=i, attempt=1, seconds=0, row=row))
    (folder / RUN_JOURNAL).write_text("".join(line.model_dump_json() + "\n" for line in lines))


def segment_run(folder: Path, plan: SegmenterPlan | None = None) -> SegmentSummary:
    opened = open_folder(folder)
    return segment_cohort(run_ct_cases(opened), opened, plan or threshold_plan(), executor=LocalExecutor(threads=1))


def test_a_run_is_segmented_and_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, 3)
    summary = segment_run(run)
    assert (summary.masks, summary.total, summary.done, summary.new) == ("segmentations", 3, 3, 3)
    labels, affine = nifti_from_bytes((run / "segmentations/P1.nii.gz").read_bytes(), "mask")
    ct, ct_affine = nifti_from_bytes((run / "scans/P1/CTres.nii.gz").read_bytes(), "ct")
    np.testing.assert_array_equal(labels > 0, ct > -300)
    np.testing.assert_allclose(affine, ct_affine)
    entry = SegmentJournal(open_folder(run)).latest("P1", "segmentations")
    assert entry is not None and entry.ct_sha256 == voxel_sha256(ct, ct_affine) and entry.labels == [1, 5]
    assert (entry.segmenter, entry.segmenter_sha256, entry.threads) == ("threshold", "1", 1)

    written = {p.name: p.stat().st_mtime_ns for p in (run / "segmentations").iterdir()}
    assert segment_run(run).new == 0
    assert {p.name: p.stat().st_mtime_ns for p in (run / "segmentations").iterdir()} == written

    (run / "segmentations/P0.nii.gz").write_bytes(b"harmed")
    (run / "segmentations/P2.nii.gz").unlink()
    journal = run / "segmentations.jsonl"
    journal.write_text(journal.read_text() + '{"time": "torn')
    summary = segment_run(run)
    assert (summary.done, summary.new) == (3, 2)
    assert segment_run(run, threshold_plan(sha256="2")).new == 3  # the same segmenter, trained anew: same folder
    assert [claim.segmenter_sha256 for claim in SegmentJournal(open_folder(run)).claims] == ["2"]


def test_the_real_package_segments_a_run(tiny_model: Path, tmp_path: Path, no_network: list[str]) -> None:
    run = tmp_path / "run"
    write_run(run, 2)
    plan = segmenter_plan(str(tiny_model))
    summary = segment_run(run, plan)
    assert (summary.done, summary.failures, no_network) == (2, {}, [])
    mask, affine = nifti_from_bytes((run / "segmentations/P0.nii.gz").read_bytes(), "mask")
    ct, ct_affine = nifti_from_bytes((run / "scans/P0/CTres.nii.gz").read_bytes(), "ct")
    assert mask.dtype == np.uint8 and mask.shape == ct.shape and mask.any()
    np.testing.assert_allclose(affine, ct_affine, atol=1e-5)
    (claim,) = SegmentJournal(open_folder(run)).claims
    assert claim.segmenter == "tiny" and claim.phantoms_only and claim.facts["training_data"] == "none, random weights"
    assert claim.facts["folder"] == str(tiny_model.absolute()) and "folder" not in plan.facts
    assert segment_run(run, plan).new == 0


def test_a_killed_session_is_taken_up_in_its_own_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, 2)
    opened = open_folder(run)

    def stop_after_one(progress: Any) -> None:
        if progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_cohort(run_ct_cases(opened), opened, threshold_plan(), executor=LocalExecutor(1), report=stop_after_one)
    (run / "segmentations/P1.nii.gz").write_bytes(b"written, but not in the journal")
    summary = segment_run(run)
    assert (summary.masks, summary.done, summary.new) == ("segmentations", 2, 1)


def test_exact_masks_and_those_of_others_are_never_touched(tmp_path: Path) -> None:
    phantoms, twins, strange = tmp_path / "phantoms", tmp_path / "twins", tmp_path / "strange"
    write_run(phantoms, 2, truth=True)
    before = {p: p.read_bytes() for p in (phantoms / "segmentations").iterdir()}
    assert segment_run(phantoms).masks == "segmentations-threshold"
    assert segment_run(phantoms).new == 0
    assert {p: p.read_bytes() for p in (phantoms / "segmentations").iterdir()} == before

    write_run(twins, 1)
    assert segment_run(twins).masks == "segmentations"
    assert segment_run(twins, threshold_plan("other")).masks == "segmentations-other"
    assert segment_run(twins).new == 0

    write_run(strange, 1)
    for folder in ("segmentations", "segmentations-threshold"):
        (strange / folder).mkdir()
        (strange / folder / "P0.nii.gz").write_bytes(b"somebody's")
    with pytest.raises(InputError, match="move them away"):
        segment_run(strange)
    assert (strange / "segmentations/P0.nii.gz").read_bytes() == b"somebody's"


def test_bad_cases_have_reasons_and_stop_no_other(tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    good = nifti_bytes(blob_ct(0, 20), (4.0, 4.0, 4.0))[0]
    holed = blob_ct(0, 20).astype(np.float32)
    holed[3, 3, 3] = np.nan
    hard = blob_ct(0, 20)
    hard.flat[0] = 7
    singular = np.diag([4.0, 4.0, 0.0, 1.0])
    files = {
        "good": (good, ""),
        "missing": (None, "cannot be read"),
        "truncated": (good[: len(good) // 2], "not a readable NIfTI"),
        "text": (b"not an image at all", "not a readable NIfTI"),
        "nan": (nifti_bytes(holed, (4.0, 4.0, 4.0))[0], "1 voxels are NaN"),
        "air": (nifti_bytes(np.minimum(blob_ct(0, 20), -900), (4.0, 4.0, 4.0))[0], "all air"),
        "flat": (nifti_bytes(np.zeros((20, 20, 20), np.int16), (4.0, 4.0, 4.0))[0], "every voxel"),
        "metres": (nifti_bytes(blob_ct(0, 20), (0.004, 0.004, 0.004))[0], "millimetres"),
        "singular": (ct_bytes(0, singular), "affine"),
        "volumes": (nifti_bytes(np.zeros((8, 8, 8, 2), np.int16)[..., 0], (4.0, 4.0, 4.0))[0], "every voxel"),
        "not-hu": (nifti_bytes(blob_ct(0, 20).astype(np.float32) * 1e4, (4.0, 4.0, 4.0))[0], "not HU"),
        "hard": (nifti_bytes(hard, (4.0, 4.0, 4.0))[0], "too much"),
        "last": (good, ""),
    }
    for name, (data, _) in files.items():
        if data is not None:
            (scans / f"{name}.nii.gz").write_bytes(data)
    cases = [CtCase(name, f"{name}.nii.gz", f"{name}.nii.gz") for name in files]
    summary = segment_cohort(cases, open_folder(out), threshold_plan(), source=str(scans))
    expected = {name: reason for name, (_, reason) in files.items() if reason}
    assert summary.failures.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in summary.failures[name], (name, summary.failures[name])
    assert sorted(p.name for p in (out / "segmentations").iterdir()) == ["good.nii.gz", "last.nii.gz"]
    assert (summary.done, summary.new) == (2, 2)

    (scans / "missing.nii.gz").write_bytes(good)  # mended; and a CT that changed is done again
    (scans / "good.nii.gz").write_bytes(nifti_bytes(blob_ct(5, 20), (4.0, 4.0, 4.0))[0])
    again = segment_cohort(cases, open_folder(out), threshold_plan(), source=str(scans))
    assert (again.done, again.new) == (3, 2) and "missing" not in again.failures


def test_a_ct_that_is_not_the_journals_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, 2)
    write_nifti_atomic(run / "scans/P0/CTres.nii.gz", blob_ct(9, 20), (4.0, 4.0, 4.0))
    summary = segment_run(run)
    assert list(summary.failures) == ["P0"] and "generate it again" in summary.failures["P0"] and summary.done == 1


def test_no_cases_and_double_ones_are_refused(tmp_path: Path) -> None:
    out = open_folder(tmp_path / "out")
    with pytest.raises(InputError, match="no subjects"):
        segment_cohort([], out, threshold_plan())
    with pytest.raises(InputError, match="more than once"):
        segment_cohort([CtCase("A", "a", "a.nii.gz")] * 2, out, threshold_plan())
    assert not (tmp_path / "out").exists()


def test_nothing_is_claimed_where_there_are_no_machines(tmp_path: Path) -> None:
    class NoMachines(LocalExecutor):
        def start(self) -> Resources:
            raise InputError("no GPUs here")

    run = tmp_path / "run"
    write_run(run, 1, sharded=True)
    opened = open_folder(run)
    with pytest.raises(InputError, match="no GPUs"):
        segment_cohort(run_ct_cases(opened), opened, threshold_plan(), executor=NoMachines())
    assert not (run / "segmentations.jsonl").exists()
    assert segment_run(run, threshold_plan("later")).masks == "segmentations"
    assert (run / "segmentations/000000/P0.nii.gz").is_file()


def test_a_segmenter_that_cannot_load_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    write_run(run, 1)
    shutil.copytree(tiny_model, model)
    plan = segmenter_plan(str(model))
    (model / WEIGHTS).unlink()
    with pytest.raises(CannotGoOn, match="weights not found"):
        segment_run(run, plan)
