"""Every tensor is where it should be: on a pretended GPU everywhere, and on a real one where there is one."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretended_gpu import GPU, PretendedGPU
from torch.utils._pytree import tree_map_only
from toy_ddim import shuffled

from cellflux_bridge import cli
from cellflux_bridge.api import Bridge
from cellflux_bridge.classifier.inference import build_classifier
from cellflux_bridge.classifier.task import ClassifierTask
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.ddim.task import build_denoiser, build_noisy_classifier
from cellflux_bridge.flow.task import FlowTask, build_flow
from cellflux_bridge.trajectory import load_trajectory
from cellflux_bridge.translation.ddim import DDIMTranslator

PATCHES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))
FABRIC = SimpleNamespace(device=GPU, autocast=nullcontext, is_global_zero=True)
LEVEL = {"target": "level", "source_image": True, "source_class": False}
FROM_NOISE = {"path": {"name": "gaussian_source"}, "condition": {"target": "level", "source_class": False}}
ADM = {"channels": 32, "multipliers": [1, 1], "attention": [], "head_channels": 16, "resblock_updown": False}


@pytest.mark.parametrize(
    "mistake", [lambda x: x + torch.ones(2), lambda x: torch.ones(2)[x.long()], lambda x: x.numpy()]
)
def test_the_pretended_gpu_notices(mistake):
    with PretendedGPU():
        x = torch.zeros(2).to(GPU)
        assert (x.device, (2 * x + torch.ones(())).device, x.cpu().device.type) == (GPU, GPU, "cpu")
        with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
            mistake(x)


@pytest.mark.parametrize(
    ("options", "sections"),
    [
        ({"method": "path"}, {"condition": {"target": "class"}, "path": {"name": "straight"}}),
        ({"method": "path", "reverse": True}, {"condition": {"target": "class"}, "path": {"name": "straight"}}),
        ({"method": "path", "solver": "dopri5", "guidance_scale": 2.0}, {}),
        (
            {"method": "path", "guidance_scale": 2.0},
            {"velocity": {"name": "dit", "width": 16, "depth": 1, "heads": 2, "patch": 4}},
        ),
        ({"method": "progression", "guidance_scale": 2.0}, {"path": {"name": "brownian"}}),
        ({"method": "progression", "guidance": {"form": "endpoint"}, "noise_resampling": 1.0}, {}),
        ({"method": "progression", "guidance": {"form": "endpoint"}}, {"path": {"name": "brownian"}}),
        ({"method": "progression", "guidance": {"form": "bridge"}}, {}),
        ({"method": "progression", "calibrate": "probability", "calibrate_each": True, "noise_resampling": 0.5}, {}),
        (
            {"method": "progression", "calibrate": "distance", "calibrate_each": True},
            {
                "velocity": {
                    "name": "adm",
                    "channels": 32,
                    "multipliers": [1, 2],
                    "blocks": 1,
                    "head_channels": 16,
                    "attention": [],
                }
            },
        ),
        ({"method": "depth", "guidance": {"form": "score"}}, FROM_NOISE),
        ({"method": "depth", "conditions": "rising", "depths": "full"}, FROM_NOISE),
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_a_flow_stays_on_its_device(tmp_path, write_config, options, sections):
    config = load_config(write_config(tmp_path, **{"condition": LEVEL, **sections}), ["data.classes=[A, B]"])
    with PretendedGPU():
        path, network = build_flow(config)
        of_images = build_classifier(config).to(GPU).eval()
        seeing_states = config.classifier.model_copy(update={"role": "guide", "sees": "state"})
        of_states = build_classifier(config.model_copy(update={"classifier": seeing_states})).to(GPU).eval()
        bridge = Bridge(
            config=config, path=path, network=network, preprocessing=Preprocessing(16), step=0, fabric=FABRIC
        )
        bridge._guides.load = lambda guidance, *, sees: [of_images if sees == "image" else of_states]
        bridge._guides.names = lambda guidance, *, measure: []
        length = {"frames": 3} if options["method"] == "path" else {"levels": 2}
        found = bridge.translate(PATCHES, source="A", target="B", steps=2, batch_size=4, **length, **options)
    assert found.frames.shape == (3, 3, 3, 16, 16)


@pytest.mark.parametrize(("guidance", "depths"), [("classifier", "fourier"), ("classifier_free", "uniform")])
def test_the_reference_bridge_stays_on_its_device(tmp_path, write_config, guidance, depths):
    section = {"timesteps": 5, "denoiser": ADM, "classifier": ADM, "guidance": guidance, "depths": depths}
    file = write_config(tmp_path, ddim=section, data={"image_size": 32})
    config = load_config(file, ["data.classes=[A, B]"])
    with PretendedGPU():
        bridge = DDIMTranslator(
            config=config,
            preprocessing=Preprocessing(32),
            step=0,
            fabric=FABRIC,
            denoiser=shuffled(build_denoiser(config)),
            classifier=shuffled(build_noisy_classifier(config)) if guidance == "classifier" else None,
        )
        found = bridge.translate(PATCHES[:1].repeat(1, 1, 2, 2), source="A", target="B", levels=2, batch_size=4)
    assert found.frames.shape == (3, 1, 3, 32, 32)


@pytest.mark.parametrize("sees", ["flow", "image", "mixed images", "state"])
def test_training_and_validation_stay_on_their_device(patch_folder, tmp_path, write_config, sees):
    classifier = {"role": "guide", "sees": "state" if sees == "state" else "image", "mixup": float("mix" in sees)}
    train = {"batch_size": 8, "validate_pairs": 16}
    sections = {"condition": LEVEL, "pairs": {"identity": True}, "train": train}
    file = write_config(tmp_path, classifier={**classifier, "train": train}, **sections)
    config = load_config(file, ["data.classes=[A, B]"])
    patches = load_patches(config.data, seed=0)
    task = FlowTask(config, patches) if sees == "flow" else ClassifierTask(config, patches)
    batch = task.batch(0, rank=0)
    with PretendedGPU():
        task.model.to(GPU)
        moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(GPU), batch)
        assert task.loss(task.model, moved).device == GPU
        assert task.validate(task.model.eval(), GPU)
        task.sheet(task.model, GPU)


# On a real one

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUICK = {"steps": 3, "batch_size": 8, "warmup_steps": 0, "validate_pairs": 8, "accelerator": "cuda"}
TRANSLATE = ("translate.levels=3", "translate.num=4", "translate.batch_size=3")
STEPS = "translate.steps=2"


def trained(tmp_path: Path, make_patches, write_config, command: str, **sections) -> Path:
    make_patches(tmp_path / "patches")
    split = {"split": {"val": 0.2, "test": 0.3}}
    classifiers = {"mixup": 1.0, "train": {**QUICK, "steps": 12}}
    train = {**QUICK, "precision": "bf16-mixed"}
    file = write_config(tmp_path, **{"data": split, "classifier": classifiers, "train": train, **sections})
    cli.main([command, str(file)])
    return tmp_path / "runs" / "tiny"


def translated(run: Path, *overrides: str) -> Path:
    cli.main(["translate", str(run), "--source", "A", "--target", "B", *TRANSLATE, *overrides])
    (folder,) = (run / "trajectories").iterdir()
    assert load_trajectory(folder).frames.shape[:2] == (4, 4)
    return folder


@needs_gpu
def test_a_guided_progression_is_made_and_judged_on_a_gpu(tmp_path, make_patches, write_config):
    run = trained(tmp_path, make_patches, write_config, "train", condition=LEVEL)
    classifiers = {"guide_rgb": "role=guide", "judge_rgb": "view=rgb", "judge_grey": "view=grey"}
    for choice in classifiers.values():
        cli.main(["train-classifier", str(run), f"classifier.{choice}"])
    cli.main(["train-classifier", str(run), "classifier.seed=1", f"output={tmp_path / 'other'}"])
    guided = ("method=progression", "guidance.form=endpoint", "calibrate=distance", "noise_resampling=1.0")
    folder = translated(run, STEPS, *(f"translate.{key}" for key in (*guided, "calibrate_each=true")))
    judges = [word for name in ("judge_rgb", "judge_grey") for word in ("--judge", str(run / name))]
    features = ["--features", str(tmp_path / "other" / "judge_rgb")]
    cli.main(["evaluate", str(folder), *judges, *features, "--levels", "3", "--output", str(tmp_path / "metrics.json")])
    assert (tmp_path / "metrics.json").exists()
    cli.main(["translate", str(run), "--overwrite", *TRANSLATE, STEPS, *(f"translate.{key}" for key in guided)])


@needs_gpu
def test_a_guided_depth_stair_is_made_on_a_gpu(tmp_path, make_patches, write_config):
    run = trained(tmp_path, make_patches, write_config, "train", **FROM_NOISE)
    cli.main(["train-classifier", str(run), "classifier.role=guide", "classifier.sees=state", "classifier.mixup=0"])
    translated(run, STEPS, "translate.method=depth", "translate.guidance.form=score")


@needs_gpu
def test_the_reference_bridge_is_trained_and_used_on_a_gpu(tmp_path, make_patches, write_config):
    network = {**ADM, "train": QUICK}
    bridge = {"timesteps": 10, "denoiser": network, "classifier": network}
    translated(trained(tmp_path, make_patches, write_config, "train-ddim", ddim=bridge))
