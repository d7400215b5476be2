"""Nuclei by the network: fields and back, scale, tiles, batches; what is no nucleus; weights that do not fit."""

import json

import numpy as np
import pytest
import torch
from drawn_nuclei import discs, lattice, require_nuclei_of_phantoms
from safetensors.torch import load_file, save_file
from skimage.draw import ellipse

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity import finding, network, outlines, validation
from cellflux_bridge.cellularity.fields import fields_of, nuclei_of
from cellflux_bridge.cellularity.network import DEPTH, DIAMETER, FOREGROUND, OFFSET, OFFSET_UNIT
from cellflux_bridge.cellularity.nuclei import (
    NotBrightField,
    Parameters,
    network_scale,
    segment,
    segment_stack,
)
from cellflux_bridge.cellularity.parameters import Scale
from cellflux_bridge.cli import main
from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.images import write_png


def decoded(labels: np.ndarray, **options) -> np.ndarray:
    """The nuclei of a label map's own fields."""
    fields = fields_of(labels)
    fields[FOREGROUND] = 20 * fields[FOREGROUND] - 10
    return nuclei_of(fields, **options)


# Fields


def test_fields_are_their_definitions():
    _, labels = discs([(30, 40)], radius=10)
    fields = fields_of(7 * labels)
    inside = labels > 0
    row, column = np.nonzero(inside)
    assert np.array_equal(fields[FOREGROUND], inside)
    assert fields[DEPTH][30, 40] == 1
    assert fields[DEPTH][~inside].max() == 0
    for place, offset, centre in zip((row, column), fields[OFFSET], (30, 40), strict=True):
        assert np.allclose(place + OFFSET_UNIT * offset[inside], centre, atol=1e-4)
    assert np.allclose(16 * 2 ** fields[DIAMETER][inside], 2 * np.sqrt(inside.sum() / np.pi))


def test_a_part_of_a_nucleus_is_told_the_diameter_of_the_whole():
    labels = np.zeros((16, 16), np.int64)
    labels[:, :3] = 2
    assert np.allclose(fields_of(labels, np.array([0.0, 8.0, 32.0]))[DIAMETER][labels > 0], 1)


@pytest.mark.parametrize("radius", [4, 5, 8, 14])
def test_touching_nuclei_come_back_out_of_their_fields(radius):
    step = 2 * radius
    _, labels = discs(lattice(step, size=8 * radius + 1), radius=radius, size=8 * radius + 1)
    labels[ellipse(4 * radius, 4 * radius, radius, 1.5 * radius, shape=labels.shape)] = 99
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    compared = validation.compare(labels, decoded(labels))
    assert compared.num_found == compared.num_true == compared.num_matched
    assert compared.area_found == pytest.approx(compared.area_true, rel=0.1)  # corners between discs are rounded


def test_every_nucleus_belongs_to_the_square_of_its_centre():
    _, labels = discs(lattice(24))
    whole = decoded(labels).max()
    parts = [decoded(labels, core=(y, x, 48)).max() for y in (0, 48) for x in (0, 48)]
    assert sum(parts) == whole == len(lattice(24))


def test_nothing_nuclear_gives_nothing():
    assert nuclei_of(np.full((5, 8, 8), -1, np.float32)).max() == 0
    assert fields_of(np.zeros((8, 8), int)).max() == 0


# The network


def test_the_built_in_network_is_small_and_its_file_too():
    weights = load_file(network.BUILT_IN)
    assert network.BUILT_IN.stat().st_size <= 1_000_000
    assert sum(p.numel() for p in network.load_network().parameters()) <= 500_000
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}


def test_normalisation_folded_into_convolutions_gives_the_same_fields():
    model = network.NucleiNet((8, 12, 16, 20))
    x = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    model.train()(x)  # so that the statistics are not those of the start
    expected = model.eval()(x)
    assert torch.allclose(network.fused(model)(x), expected, atol=1e-5)


def test_a_pixel_is_seen_no_farther_than_the_reach():
    model = network.load_network()
    x = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[..., 160, 160] = 0
    with torch.no_grad():
        seen = (model(x) != model(changed)).any(dim=1)[0].nonzero()
    assert (seen - 160).abs().max() <= network.REACH


# Finding


@pytest.mark.parametrize("size", [32, 64, 256])
def test_nuclei_of_phantoms_of_every_severity_and_stain(size):
    require_nuclei_of_phantoms(segment, size)


def test_frames_go_through_together_as_they_would_alone():
    stack = np.stack([make_phantom(s, size=48, seed=3).image for s in (0.1, 0.5, 0.9)])
    scale = network_scale([stack], mpp=None, parameters=Parameters())
    together = segment_stack(stack, mpp=None, parameters=Parameters())
    assert together.scale == scale
    assert together.labels.dtype == np.int32
    for rgb, labels in zip(stack, together.labels, strict=True):
        assert validation.compare(segment(rgb, scale=scale), labels).num_matched == labels.max()


def test_a_large_image_by_tiles_has_the_nuclei_of_the_whole(monkeypatch):
    rgb = np.concatenate([make_phantom(s, size=320, seed=5, nucleus_diameter=15).image for s in (0.2, 0.8)], axis=1)
    scale, model = Scale(1.0), network.load_network()
    whole = finding.find_nuclei(rgb[None], scale, model)[0]
    monkeypatch.setattr(finding, "_TILE", 112)
    tiled = finding.find_nuclei(rgb[None], scale, model)[0]
    compared = validation.compare(whole, tiled)
    assert compared.num_true == compared.num_found == compared.num_matched
    assert ((whole > 0) == (tiled > 0)).mean() > 0.9999


def test_microns_per_pixel_give_the_scale_and_images_without_them_tell_it():
    assert finding.known_scale(0.25).factor == 2 * finding.known_scale(0.125).factor
    image = make_phantom(0.5, size=128, seed=0, nucleus_diameter=12).image
    small, large = (
        network_scale([rgb[None]], mpp=None, parameters=Parameters())
        for rgb in (image, image.repeat(2, axis=0).repeat(2, axis=1))
    )
    assert small.factor / large.factor == pytest.approx(2, rel=0.15)
    assert large.diameter / small.diameter == pytest.approx(2, rel=0.15)
    assert 0.7 <= small.agreement <= 1
    assert network_scale([np.full((1, 64, 64, 3), 240, np.uint8)], mpp=None, parameters=Parameters()).agreement == 0


@pytest.mark.parametrize("colour", [(30, 60, 170), (40, 140, 70), (25, 25, 25), (0, 0, 0), (190, 30, 40)])
def test_pen_and_black_borders_are_no_nuclei(colour):
    glass = np.full((128, 128, 3), 246, np.uint8)
    glass[50:70] = colour
    try:
        assert segment(glass).max() == 0
    except NotBrightField:
        pass
    phantom = make_phantom(0.5, size=128, seed=1, nucleus_diameter=14)
    rgb = phantom.image.copy()
    rgb[50:70] = colour
    clear = len(np.unique(np.delete(phantom.labels, range(46, 74), axis=0))) - 1
    assert 0.8 * clear <= segment(rgb, scale=Scale(1.0)).max() <= 1.15 * phantom.labels.max()


def test_red_cells_are_no_nuclei():
    rng = np.random.default_rng(0)
    field = np.clip(np.array((240, 205, 218)) + rng.normal(0, 3, (192, 192, 3)), 0, 255)
    row, column = np.mgrid[:192, :192]
    centres = lattice(24, size=192)
    for number, (y, x) in enumerate(centres):
        field[np.hypot(row - y, column - x) < 6] = (95, 65, 145) if number % 8 == 0 else (205, 70, 80)
    found = segment(field.astype(np.uint8))
    centre_labels = [found[y, x] for y, x in centres]
    assert all(label == 0 for number, label in enumerate(centre_labels) if number % 8)
    assert found.max() <= len(centres) // 8 + 1


def test_nothing_is_found_on_glass_and_in_even_tissue():
    noise = np.random.default_rng(0).normal(0, 1.5, (64, 64, 3))
    for colour in ((246, 244, 247), (225, 165, 205)):
        assert segment(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).max() == 0


# Weights from elsewhere


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    weights = load_file(network.BUILT_IN)
    wrong = {
        "missing": {k: v for k, v in weights.items() if k != "head.bias"},
        "shape": weights | {"head.bias": torch.zeros(3)},
        "other": {"layer.weight": torch.zeros(2, 2)},
    }
    for name, tensors in wrong.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=rf"{name}\.safetensors: not the weights .*(head\.bias|down)"):
            network.read_weights(tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(network.BUILT_IN.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.safetensors: cannot be read"):
        network.read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"none\.safetensors: cannot be read"):
        network.read_weights(tmp_path / "none.safetensors")


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--device nowhere: not there"):
        network.load_network("", "nowhere")


# Single nuclei


def test_outlines_enclose_the_nuclei():
    rgb, labels = discs([(20, 30), (60, 70)], radius=8)
    labels[90, 5] = 3  # of one pixel
    rows = outlines.nuclei_table(rgb, labels)
    assert [row["nucleus"] for row in rows] == [1, 2, 3]
    assert (rows[0]["x"], rows[0]["y"]) == (30.5, 20.5)
    for row in rows:
        x, y = np.array(row["polygon"]).T
        assert (x[0], y[0]) == (x[-1], y[-1])
        enclosed = abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
        assert enclosed == pytest.approx(row["area"], rel=0.1, abs=0.51)
    assert rows[0]["eccentricity"] < 0.1
    assert rows[0]["darkness"] == pytest.approx(1.2, rel=0.05)


def test_single_nuclei_are_written_for_qupath(tmp_path):
    phantom = make_phantom(0.5, size=64, seed=0, nucleus_diameter=10)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    write_png(tmp_path / "images" / "sub" / "a.png", phantom.image)
    where = ["--images", str(tmp_path / "images"), "--nuclei", str(tmp_path / "out")]
    main(["cellularity", *where, "--output", str(tmp_path / "counts.csv"), "--workers", "1"])
    collection = json.loads((tmp_path / "out" / "sub" / "a.png.geojson").read_text())
    table = (tmp_path / "out" / "sub" / "a.png.csv").read_text().splitlines()
    assert table[0] == "nucleus,x,y,area,eccentricity,darkness,polygon"
    assert len(collection["features"]) == len(table) - 1 == segment(phantom.image).max()
    assert {f["geometry"]["type"] for f in collection["features"]} == {"Polygon"}
    with pytest.raises(SystemExit):
        main(["cellularity", "--label-maps", str(tmp_path), "--nuclei", str(tmp_path / "out")])


# What was wrong once


def test_an_image_with_a_blank_middle_is_looked_at_as_a_whole():
    rgb = make_phantom(0.5, size=900, seed=0, nucleus_diameter=48).image
    rgb[180:720, 180:720] = 246
    scale = network_scale([rgb[None]], mpp=None, parameters=Parameters())
    assert scale.diameter == pytest.approx(48, rel=0.4)


def test_a_small_file_of_a_huge_network_is_refused_by_its_shapes(tmp_path):
    norms = {f"down.{n}.1.norm.weight": torch.ones(4096) for n in range(4)}
    save_file(norms, tmp_path / "fat.safetensors")
    with pytest.raises(UserError, match=r"fat\.safetensors: not the weights"):
        network.read_weights(tmp_path / "fat.safetensors")


def test_a_model_or_device_that_is_not_there_is_said_before_anything_is_counted(tmp_path):
    write_png(tmp_path / "a.png", make_phantom(0.5, size=32, seed=0).image)
    for flag, value, message in (("--model", "nothere", "nothere: cannot be read"), ("--device", "meta", "not there")):
        with pytest.raises(SystemExit, match=message):
            main(["cellularity", "--images", str(tmp_path), flag, value, "--output", str(tmp_path / "out.csv")])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
