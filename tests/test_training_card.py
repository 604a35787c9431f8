"""A model's card over several trainings: what each leaves as it was."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.blobs import write_blobs
from vtrial.diffusion.weights import ExtentFit, ModelCard, read_card, verify_model, write_card
from vtrial.pipeline.training import fit_stage, train_here
from vtrial.training import in_turn
from vtrial.training.checkpoint import CHECKPOINT

HOSPITAL = ExtentFit(slices_per_m=150.0, slices_at_0=90.0)


def prepared(folder: Path, extent: ExtentFit | None = None) -> Path:
    """A training set; of real scans where it tells how long bodies are."""
    write_blobs(folder, 3)
    if extent:
        manifest = {"identity": {"kind": str(folder.name)}, "facts": {"extent": extent.model_dump()}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def fit(stage: str, data: Path, out: Path) -> ModelCard:
    """Two steps of a stage, by the command."""
    torch.set_num_threads(1)
    config = out.parent / f"{stage}.toml"
    first = "patch = 2\nattention_head_channels = 16\n"
    second = "patch = 4\nattention_head_channels = 0\nlow_resolution = true\n"
    config.write_text(
        f'stage = "{stage}"\nsteps = 2\nbatch = 2\ndata = {{ patch_shape = [8, 8, 16] }}\n'
        "scaling = { center = [0.0, 0.0], sd = [0.5, 0.5] }\n"
        f"[network]\nchannels = [8, 16]\nblocks = [1, 1]\n{second if stage == 'super-resolution' else first}"
    )
    found = fit_stage(config, data, out, lambda line: None, None, None, train_here)
    assert isinstance(found, ModelCard)
    return found


def test_a_stage_whose_training_is_gone_stays_in_the_model(tmp_path: Path) -> None:
    data, out = prepared(tmp_path / "data"), tmp_path / "m"
    fit("global", data, out)
    before = fit("super-resolution", prepared(tmp_path / "others"), out)
    shutil.rmtree(out / "training" / "global")
    assert fit("super-resolution", tmp_path / "others", out) == before == verify_model(out)
    assert list(before.stages) == ["global", "super-resolution"]

    with_expert = fit("global-detail", data, out)
    kept = with_expert.stages["global"]
    assert with_expert.support == before.support and kept.sampler.sigma_min == 0.002
    assert kept.model_copy(update={"sampler": before.stages["global"].sampler}) == before.stages["global"]
    verify_model(out)

    (out / kept.file).unlink()  # neither a checkpoint nor weights: there is no such stage
    assert list(fit("super-resolution", tmp_path / "others", out).stages) == ["global-detail", "super-resolution"]


def test_two_stages_that_end_at_once_are_both_in_the_model(tmp_path: Path) -> None:
    data, out = prepared(tmp_path / "data"), tmp_path / "m"
    card = fit("global", data, out)
    second = threading.Thread(target=fit, args=("super-resolution", data, out))
    with in_turn(out / "training"):  # as another process that exports
        second.start()
        while not (out / "training" / "super-resolution" / CHECKPOINT).is_file():
            time.sleep(0.05)
        second.join(1.0)
        assert second.is_alive() and list(read_card(out).stages) == ["global"]
        write_card(out, card.model_copy(update={"description": "of the other process"}))
    second.join()
    both = verify_model(out)
    assert both.description == "of the other process" and list(both.stages) == ["global", "super-resolution"]


def test_a_finished_training_leaves_the_card_as_it_is(tmp_path: Path) -> None:
    data, out = prepared(tmp_path / "data"), tmp_path / "m"
    card = fit("global", data, out)
    told = {"fidelity": [{"organ": "liver"}], "license": "CC-BY-4.0", "description": "Ours.", "hardware": "a GPU"}
    write_card(out, card.model_copy(update=told | {"extent": HOSPITAL}))
    before = read_card(out)
    assert fit("global", data, out) == read_card(out) == before
    added = fit("super-resolution", data, out)
    assert (added.license, added.description, added.extent) == ("CC-BY-4.0", "Ours.", HOSPITAL)
    assert added.fidelity == [], "measured of other weights"


@pytest.mark.parametrize("again", [False, True])
def test_lengths_of_bodies_are_those_of_the_data_of_stage_one(again: bool, tmp_path: Path) -> None:
    hospital, others = prepared(tmp_path / "hospital", HOSPITAL), prepared(tmp_path / "others", ExtentFit())
    out = tmp_path / "m"
    if again:  # stage 2 before stage 1: its data tell until stage 1's do
        assert fit("super-resolution", others, out).extent == ExtentFit()
    assert fit("global", hospital, out).extent == HOSPITAL
    card = fit("super-resolution", others, out)
    assert (card.extent, card.data) == (HOSPITAL, str(hospital))
