"""Every configuration that ships builds: network, path, coupling, classifier, and shapes that fit each other."""

from pathlib import Path

import pytest
import torch

from cellflux_bridge.classifier.inference import build_classifier
from cellflux_bridge.config import Config, load_config, registry
from cellflux_bridge.field.classifier_guided import require_form
from cellflux_bridge.flow.network import build_flow, make_condition
from cellflux_bridge.study.settings import StudyConfig
from cellflux_bridge.training.loop import make_fabric

FOLDER = Path(__file__).parents[1] / "configs"
STUDIES = sorted(FOLDER.glob("study_*.yaml"))
CONFIGS = sorted({*FOLDER.glob("*.yaml")} - {*STUDIES, FOLDER / "nuclei.yaml"})  # which train no flow


def generators() -> list:
    """(file, settings) of the generators that the studies train."""
    found = []
    for path in STUDIES:
        for name, of in load_config(path, schema=StudyConfig).beside(FOLDER).generators.items():
            found.append(pytest.param((of.config, of.set), id=f"{path.stem}-{name}"))
    return found


@pytest.fixture(params=[*(pytest.param((path, []), id=path.stem) for path in CONFIGS), *generators()])
def config(request) -> Config:
    config = load_config(*request.param)
    named = {
        *config.data.split.unseen,
        *(label for part in config.condition.parts for label in part.get("without", ())),
    }
    named |= {label for label in (config.translate.source, config.translate.target) if label is not None}
    names = {
        "classes": config.data.classes or sorted({"A", "B", *named}),
        "batches": config.data.batches or ["p1", "p2"],
    }
    return config.model_copy(update={"data": config.data.model_copy(update=names)})


def test_configurations_are_found():
    assert {"example", "lung"} <= {path.stem for path in CONFIGS}


def test_the_network_turns_states_into_velocities(config):
    with torch.device("meta"):
        _, network = build_flow(config)
        size = config.data.image_size
        x = torch.empty(2, config.data.channels, size, size)
        label = torch.empty(2, len(config.data.classes))
        cond = make_condition(network.spec, x0=x, target_label=label, source_class=0).null()
        assert network.eval()(torch.empty(2), x, cond).shape == x.shape


def test_the_path_fits_the_translation_and_its_guidance(config):
    path, translate, condition = registry.build("path", config.path), config.translate, config.condition
    assert path.from_data == (translate.method not in ("depth", "generate"))
    if translate.guidance.form != "none":
        scale = translate.guidance_scale
        sees_source, dropout = condition.source_image, condition.dropout
        require_form(translate.guidance.form, path, sees_source=sees_source, dropout=dropout, scale=scale)


def test_the_coupling_permutes_a_batch(config):
    coupling = registry.build("coupling", config.coupling)
    x0, x1 = map(
        coupling.features, torch.randn(2, 6, config.data.channels, 32, 32, generator=torch.Generator().manual_seed(0))
    )
    i, j = coupling.pair(x0, x1, blocks=torch.zeros(6), generator=torch.Generator().manual_seed(0))
    assert sorted(i.tolist()) == sorted(j.tolist()) == list(range(6))


def test_the_classifier_tells_the_classes_apart(config):
    offline = config.model_copy(update={"classifier": config.classifier.model_copy(update={"pretrained": False})})
    size = config.data.image_size
    with torch.device("meta"):
        logits = build_classifier(offline).eval()(torch.empty(2, config.data.channels, size, size))
    assert logits.shape == (2, len(config.data.classes))


def test_classes_transitions_and_translations_know_each_other(config):
    named = {config.translate.source, config.translate.target} - {None}
    if config.pairs.transitions != "all":
        named |= {label for pair in config.pairs.transitions for label in pair}
    assert named - {"*"} <= set(config.data.classes)


def test_precision_and_strategy_are_known(config):
    on_cpu = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    make_fabric(config.train.model_copy(update=on_cpu))
    make_fabric(config.classifier.train.model_copy(update=on_cpu))
