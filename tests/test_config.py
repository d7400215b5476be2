"""Configuration: what wins, what is refused and in which words, and that a saved run says all that it was made with."""

import json
import sys
from pathlib import Path

import pytest

from cellflux_bridge.api import Bridge
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.settings import NucleiConfig
from cellflux_bridge.cli import main
from cellflux_bridge.config import Config, load_config, parse_overrides, registry, split_overrides
from cellflux_bridge.config.schema import dump_yaml, parse_yaml
from cellflux_bridge.study.settings import StudyConfig
from cellflux_bridge.translation.ddim import DDIMTranslator

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))


@pytest.fixture
def load(tmp_path):
    """`load(text, *overrides)`: the configuration of a YAML text that names a data root."""

    def load(text: str = "", *overrides: str, root: str = "data: {root: x}\n") -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(root + text, encoding="utf-8")
        return load_config(path, overrides)

    return load


def refusal(load, text: str = "", *overrides: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides, **options)
    return str(caught.value)


def test_defaults_yield_to_the_file_and_the_file_to_the_command_line(load):
    assert load().train.lr == 2e-4
    assert load("train: {lr: 0.5, steps: 7}").train.lr == 0.5
    config = load("train: {lr: 0.5, steps: 7}", "train.lr=0.25")
    assert (config.train.lr, config.train.steps, config.train.batch_size) == (0.25, 7, 64)


def test_a_key_set_to_its_default_leaves_all_others_at_theirs(load):
    default = load()
    values = default.flat()
    one_a_section = {key.rpartition(".")[0]: key for key in values}
    assert {"classifier.train", "ddim.denoiser.train", "ddim.classifier", "translate.guidance"} <= set(one_a_section)
    for key in one_a_section.values():
        assert load("", f"{key}={json.dumps(values[key])}") == default, key


def test_the_sections_of_classifiers_keep_their_own_defaults(load):
    config = load("classifier: {train: {batch_size: 32}}\nddim: {classifier: {train: {steps: 7}}}\n")
    train, bridge = config.classifier.train, config.ddim.classifier
    assert (train.batch_size, train.steps, train.lr, train.ema_decay) == (32, 1500, 1e-3, 0.99)
    assert (bridge.train.steps, bridge.train.weight_decay, bridge.multipliers) == (7, 1e-2, (1, 2, 2))
    assert load("", "ddim.denoiser.train.steps=7").ddim.denoiser.train.sample_every == 0


def test_the_last_of_two_overrides_wins(load):
    assert load("", "train.steps=2", "train.steps=3").train.steps == 3


def test_the_name_and_the_output_come_from_the_file_name(load):
    assert (load().name, load().output) == ("run", Path("runs/run"))
    assert load("name: other").output == Path("runs/other")
    assert load("name: other\noutput: there").output == Path("there")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", ".0001", "0.0001", "1.0e-04"])
def test_a_number_in_scientific_notation_is_a_float(load, text):
    assert load(f"train: {{lr: {text}}}").train.lr == 1e-4
    assert load("", f"train.lr={text}").train.lr == 1e-4


def test_words_that_yaml_1_1_takes_for_booleans_stay_class_names(load):
    classes = ["no", "yes", "on", "off", "n", "Y"]
    assert load(root=f"data: {{root: x, classes: [{', '.join(classes)}]}}").data.classes == classes
    assert load("", "data.classes=[no, yes]", "translate.source=no").translate.source == "no"
    assert load("", "data.flips=false").data.flips is False


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("trian: {lr: 1}", "trian: unknown key", "did you mean 'train'?"),
        ("train: {lrr: 1}", "train.lrr: unknown key", "did you mean 'train.lr'?"),
        ("classifier: {train: {stepz: 1}}", "classifier.train.stepz: unknown key", "'classifier.train.steps'?"),
        (
            "ddim: {classifier: {train: {stepz: 1}}}",
            "ddim.classifier.train.stepz: unknown key",
            "'ddim.classifier.train.steps'?",
        ),
        ("coupling: {cots: pixels}", "coupling.cots: unknown key", "did you mean 'coupling.cost'?"),
        ("coupling: minibatch_to", "coupling.name: no coupling called 'minibatch_to'", "did you mean 'minibatch_ot'?"),
        ("path: {name: noised_sauce}", "path.name: no path called 'noised_sauce'", "did you mean 'noised_source'?"),
        ("train: {zzzzzz: 1}", "train.zzzzzz: unknown key", "valid here: steps, batch_size"),
    ],
)
def test_an_unknown_key_or_name_is_refused_with_its_place_and_the_nearest_valid_one(load, text, key, hint):
    message = refusal(load, text)
    assert "run.yaml" in message
    assert key in message
    assert hint in message


@pytest.mark.parametrize(
    ("text", "key", "found"),
    [
        ("train: {steps: many}", "train.steps: ", "'many'"),
        ("train: {steps: 1.5}", "train.steps: ", "1.5"),
        ("train: {steps: true}", "train.steps: ", "True"),
        ("train: {max_minutes: true}", "train.max_minutes: ", "True"),
        ("train: {steps: 0}", "train.steps: ", "0"),
        ("train: {lr: .inf}", "train.lr: ", "inf"),
        ("train: {lr: .nan}", "train.lr: ", "nan"),
        ("train: 3", "train: ", "3"),
        ("train:", "train: ", "None"),
        ("seed: [1]", "seed: ", "[1]"),
        ("1: 2", "1: ", "1"),
        ("coupling: {cost: pixel}", "coupling.cost: ", "'pixel'"),
        ("coupling: {thumbnail: 1}", "coupling.thumbnail: ", "1"),
        ("coupling: {thumbnail: true}", "coupling.thumbnail: ", "True"),
        ("coupling: [minibatch_ot]", "coupling: expected a name or a mapping", "['minibatch_ot']"),
        ("coupling:", "coupling: expected a name or a mapping", "None"),
        ("coupling: {name: 3}", "coupling.name: ", "3"),
        ("pairs: {transitions: some}", "pairs.transitions: ", "'some'"),
        ("pairs: {transitions: [[A, B, C]]}", "pairs.transitions.0: ", "['A', 'B', 'C']"),
        ("train: {devices: [1]}", "train.devices: ", "[1]"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_was_found(load, text, key, found):
    message = refusal(load, text)
    assert "run.yaml" in message
    assert any(line.startswith(key) and found in line for line in message.splitlines()), message


@pytest.mark.parametrize(
    ("levels", "line"),
    [
        ("many", "translate.levels: input should be a valid integer or a valid list, found 'many'"),
        ("0", "translate.levels: input should be greater than or equal to 1, found 0"),
        ("[0.5, 2]", "translate.levels.1: input should be less than or equal to 1, found 2"),
    ],
)
def test_a_key_of_two_types_gets_one_line(load, levels, line):
    _, told, note = refusal(load, f"translate: {{method: progression, levels: {levels}}}").splitlines()
    assert (told, note) == (line, "(arguments of transport 'progression')")


def test_the_reference_bridges_method_names_its_own_command(load):
    assert "cellflux-bridge train-ddim" in refusal(load, "translate: {method: ddim}")


def test_wrong_values_of_the_data_section_are_refused(load):
    message = refusal(load, root="data: {root: x, split: {val: 0.5, test: 0.5}}")
    assert "data.split: val + test must stay below 1" in message
    assert "data.classes: 'A' stands twice" in refusal(load, root="data: {root: x, classes: [A, B, A]}")
    message = refusal(load, root="data: {root: x, layout: {name: phantom, size: 8}}")
    assert "data.layout.size: input should be greater than or equal to 16, found 8" in message
    assert "data: field required" in refusal(load, root="")


def test_every_mistake_is_listed_at_once(load):
    message = refusal(load, "train: {lrr: 1, steps: many}\nsede: 1")
    assert all(key in message for key in ("train.lrr", "train.steps", "sede"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "hello\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(load, text):
    assert "run.yaml: expected a mapping" in refusal(load, text, root="")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for name in ("missing.yaml", "latin.yaml", "."):
        with pytest.raises(UserError, match="cannot read this configuration"):
            load_config(tmp_path / name)


def test_broken_yaml_and_foreign_tags_are_refused(load):
    assert "not valid YAML" in refusal(load, "train: {lr: [1\n")
    assert "not valid YAML" in refusal(load, "seed: !!python/object/apply:os.getpid []\n")


def test_a_key_that_stands_twice_is_refused(load):
    message = refusal(load, "train: {lr: 1}\ntrain: {steps: 2}\n")
    assert "key 'train' stands twice" in message
    assert "line 3" in message
    assert "key 'lr' stands twice" in refusal(load, "train: {lr: 1, lr: 2}\n")


def test_a_merged_mapping_may_be_overridden(load):
    config = load("train: &slow {lr: 0.5, steps: 3}\nclassifier: {train: {<<: *slow, steps: 4}}\n")
    assert (config.classifier.train.lr, config.classifier.train.steps) == (0.5, 4)


@pytest.mark.parametrize("text", ["train.lr", "=3", "train..lr=3", ".lr=3", "train.=3", ""])
def test_an_override_of_another_form_is_refused(text):
    with pytest.raises(UserError, match=r"expected key=value"):
        parse_overrides([text])


def test_mistakes_on_the_command_line_are_named(load):
    assert "command line, train.lr: not valid YAML" in refusal(load, "", "train.lr=[1")
    assert "train.lrr: unknown key; did you mean 'train.lr'?" in refusal(load, "", "train.lrr=1")
    assert "train.lr: input should be a valid number" in refusal(load, "", "train.lr=")
    assert "train.lr: input should be a valid number" in refusal(load, "", "train.lr=1", "train.lr.x=2")


def test_an_override_may_hold_an_equals_sign_and_a_list(load):
    assert load("", "name=a=b").name == "a=b"
    assert load("", "pairs.transitions=[[A, B], [B, A]]").pairs.transitions == [("A", "B"), ("B", "A")]


def test_another_component_drops_the_arguments_of_the_old_one(load):
    old = "coupling: {name: minibatch_ot, cost: pixels, thumbnail: 4}\n"
    for override in ("coupling=independent", "coupling.name=independent"):
        assert load(old, override).coupling == {"name": "independent"}
    assert load(old, "path.name=straight").path == {"name": "straight"}


def test_the_same_component_keeps_the_arguments_that_are_not_named(load):
    old = "coupling: {name: minibatch_ot, cost: pixels, thumbnail: 4}\n"
    expected = {"name": "minibatch_ot", "cost": "thumbnail", "thumbnail": 4}
    assert load(old, "coupling.cost=thumbnail").coupling == expected
    assert load(old, "coupling.name=minibatch_ot", "coupling.cost=thumbnail").coupling == expected
    assert load("coupling: minibatch_ot\n", "coupling.thumbnail=4").coupling["thumbnail"] == 4


def test_a_component_without_a_name_is_the_default_one(load):
    assert load("coupling: {cost: pixels}").coupling == {"name": "minibatch_ot", "cost": "pixels", "thumbnail": 8}


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module outside the package that holds a coupling."""
    (tmp_path / "guest_coupling.py").write_text(
        "import torch\n"
        "from cellflux_bridge.coupling.base import Coupling\n"
        "class Shifted(Coupling):\n"
        "    def __init__(self, *, by: int, label: str = 'x', free=None):\n"
        "        self.by = by\n"
        "    def permutation(self, x0, x1, *, generator):\n"
        "        return (torch.arange(len(x0)) + self.by) % len(x0)\n"
        "number = 3\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "guest_coupling:Shifted"
    sys.modules.pop("guest_coupling", None)


def test_a_component_of_ones_own_is_found_and_its_constructor_is_its_schema(load, foreign):
    config = load(f"coupling: {{name: '{foreign}', by: 2}}")
    assert config.coupling == {"name": foreign, "by": 2, "label": "x", "free": None}
    coupling = registry.build("coupling", config.coupling)
    assert type(coupling).__name__ == "Shifted"
    assert coupling.by == 2


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{{name: '{0}'}}", "coupling.by: field required"),
        ("{{name: '{0}', by: two}}", "coupling.by: input should be a valid integer"),
        ("{{name: '{0}', by: 2, lable: y}}", "coupling.lable: unknown key; did you mean 'coupling.label'?"),
        ("guest_coupling:Shiftd", "coupling.name: cannot import 'guest_coupling:Shiftd'"),
        (
            "guest_coupling:number",
            "coupling.name: 'guest_coupling:number' is no coupling; expected a class derived from",
        ),
        ("guest_coupling:Coupling", "coupling.name: 'guest_coupling:Coupling' is abstract"),
        ("subprocess:Popen", "coupling.name: 'subprocess:Popen' is no coupling"),
        (
            "cellflux_bridge.path.straight:Straight",
            "is no coupling; expected a class derived from cellflux_bridge.coupling",
        ),
        ("no_such_module:Thing", "coupling.name: cannot import 'no_such_module:Thing'"),
        ("':Thing'", "coupling.name: cannot import ':Thing'"),
        ("'.relative:Thing'", "coupling.name: cannot import '.relative:Thing'"),
    ],
)
def test_mistakes_in_a_component_of_ones_own_name_the_key(load, foreign, spec, expected):
    assert expected in refusal(load, f"coupling: {spec.format(foreign)}")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The name of a class in a module that leaves a file when it is imported, and that file."""
    sprung = tmp_path / "sprung"
    module = f"trap_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(
        f"from cellflux_bridge.coupling.independent import Independent\nopen({str(sprung)!r}, 'w').close()\n"
        "class Trap(Independent): pass\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield f"{module}:Trap", sprung
    sys.modules.pop(module, None)


@pytest.fixture
def received(tmp_path, trap):
    """A run's folder from somebody else, which is a checkpoint too; its config.yaml names the trap."""
    folder = tmp_path / "received"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"data: {{root: x, classes: [A, B]}}\ncoupling: '{trap[0]}'\n", encoding="utf-8"
    )
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("key", ["coupling", "path", "velocity", "data.layout"])
def test_a_saved_configuration_runs_no_code(tmp_path, trap, key):
    name, sprung = trap
    section = f"layout: '{name}'" if key == "data.layout" else ""
    text = f"data: {{root: x, {section}}}\n" + ("" if section else f"{key}: {{name: '{name}', by: 1}}\n")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"(?s)config\.yaml.*{key}\.name: '{name}' is code outside .*--trust"):
        load_config(tmp_path / "config.yaml")
    assert not sprung.exists()


def test_foreign_code_runs_where_the_caller_or_the_command_line_trusts_it(tmp_path, received, trap):
    name, sprung = trap
    for changed in ("train.steps=3", "coupling.x=1"):
        with pytest.raises(UserError, match="--trust"):
            load_config(received / "config.yaml", [changed])
    with pytest.raises(ValueError, match="--trust"):
        Config.model_validate({"name": "x", "output": "x", "data": {"root": "x"}, "coupling": name})
    assert not sprung.exists()
    assert load_config(received / "config.yaml", trust=True).coupling["name"] == name
    assert sprung.exists()
    assert load_config(received / "config.yaml", [f"coupling={name}"]).coupling["name"] == name
    own = tmp_path / "own.yaml"
    own.write_text((received / "config.yaml").read_text())
    assert load_config(own).coupling["name"] == name
    with pytest.raises(UserError, match="--trust"):
        load_config(own, trust=False)


def test_a_backbone_of_a_hub_is_asked_for_where_the_user_names_it(tmp_path, write_config):
    """timm fetches from the hub already where it only builds the network."""
    foreign, own = "hf-hub:owner/a-model", "classifier.backbone=hf-hub:owner/a-model"
    file = write_config(tmp_path, file="config.yaml", classifier={"backbone": foreign})
    with pytest.raises(UserError, match=r"classifier\.backbone: 'hf-hub:owner/a-model' is fetched from .* --trust"):
        load_config(file)
    assert load_config(file, [own]).classifier.backbone == foreign
    assert load_config(file, trust=True).classifier.backbone == foreign
    assert load_config(write_config(tmp_path, classifier={"backbone": foreign})).classifier.backbone == foreign


def test_what_the_users_own_file_names_is_trusted_in_its_run_until_the_block_ends(tmp_path, received):
    own = tmp_path / "own.yaml"
    own.write_text((received / "config.yaml").read_text())
    with registry.trusting(False):
        load_config(own)
        load_config(received / "config.yaml")
    with pytest.raises(UserError, match="--trust"):
        load_config(received / "config.yaml")


@pytest.mark.parametrize(
    "command",
    [
        ["config", "show"],
        ["data", "check"],
        ["train"],
        ["train-classifier"],
        ["train-ddim"],
        ["translate"],
        ["video"],
        ["cellularity"],
    ],
    ids=" ".join,
)
def test_no_command_runs_code_that_a_received_folder_names(received, trap, command):
    (received / "trajectory.json").touch()
    with pytest.raises(SystemExit, match=r"config\.yaml:\ncoupling\.name: .* --trust"):
        main([*command, str(received)])
    assert not trap[1].exists()


@pytest.mark.parametrize("load", [Bridge.load, DDIMTranslator.load], ids=["Bridge", "DDIMTranslator"])
def test_a_received_run_is_loaded_with_trust_only(received, trap, load):
    with pytest.raises(UserError, match="trust=True"):
        load(received)
    assert not trap[1].exists()
    with pytest.raises(UserError):  # which holds no weights
        load(received, trust=True)
    assert trap[1].exists()


def test_trust_on_the_command_line_runs_it(received, trap, capsys):
    main(["config", "show", str(received), "--trust", "--key", "coupling.name"])
    assert capsys.readouterr().out.strip() == trap[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)), "more than"),  # noqa: E501
        ("a: &a {k: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)), "more than"),  # noqa: E501
        ("a: &a [*a]\n", "inside what it names"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a:\n" + "".join(" " * n + "- \n" for n in range(1, 600)), "nested too deeply"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("# " + "x" * 1_000_001, "longer than"),
    ],
    ids=["bomb", "merge bomb", "loop", "deep", "deep blocks", "digits", "date", "tag", "python", "long"],
)  # fmt: skip
def test_hostile_yaml_is_refused_at_once(load, text, reason):
    assert reason in refusal(load, text)


def test_a_path_with_an_equals_sign_is_no_override(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    texts = ["runs/a=b", "train.lr=1", "./x=1", "lr=1", "data.root=/a/b=c", "x", "path=straight"]
    assert split_overrides(texts) == (
        ["runs/a=b", "./x=1", "lr=1", "x"],
        ["train.lr=1", "data.root=/a/b=c", "path=straight"],
    )


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_every_file_of_a_kind_is_a_component_with_defaults(kind):
    for name in registry.names(kind):
        needed = {"table": "vectors.csv", "dimension": 2} if name == "embedding" else {}
        assert registry.validate(kind, {"name": name, **needed}, key=kind)["name"] == name


def test_a_saved_configuration_is_complete_and_loads_equal(load, tmp_path):
    config = load(
        "name: naïve no\nseed: 3\ntrain: {lr: 1e-5, betas: [0.5, 0.75], max_minutes: 1e3}\n"
        "pairs: {transitions: [['no', '1e3']]}\nvelocity: {multipliers: [1, 2], attention: []}\n",
        root="data: {root: a b, classes: ['no', '1e3', '2', 'null', '1:30', '0o7', '~', '#', '2024-01-01', '1_0']}\n",
    )
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(saved) == config
    assert load_config(saved).digest() == config.digest()
    assert set(parse_yaml(config.to_yaml(), origin="saved")) == set(Config.model_fields)


@pytest.mark.parametrize("word", ["1e3", "1e-4", "5.", ".5e3", "-1E+5", "no", "on", "true", "12", "0x10", "", "null"])
def test_a_word_that_looks_like_a_value_stays_a_word_when_written(word):
    assert parse_yaml(dump_yaml({"key": [word]}), origin="text") == {"key": [word]}


def test_a_value_is_found_by_its_key_and_a_section_is_a_mapping(load):
    config = load("train: {steps: 7}")
    assert config.value("train.steps") == 7
    assert config.value("data.split") == {"val": 0.1, "test": 0.2, "train_groups": None, "unseen": []}
    for key in ("train.stepz", "train.steps.more", "trian"):
        with pytest.raises(UserError, match=rf"^{key}: no such key"):
            config.value(key)


def test_the_digest_follows_what_sequences_are_made_with_and_nothing_else(load):
    digest = load().digest()
    same = ["name=other", "output=there", "video.fps=5", "translate.num=3", "translate.batch_size=2"]
    moved = [
        "perceptual.share=0.5",
        "data.root=there",
        "data.cache_dir=there",
        "data.workers=3",
        "train.steps=3",
        "train.accelerator=cpu",
        "train.validate_pairs=8",
    ]
    for override in [*same, *moved, "classifier.jitter=0.5"]:
        assert load("", override).digest() == digest, override
    for override in [
        "seed=1",
        "train.lr=3",
        "data.image_size=32",
        "translate.steps=7",
        "path=straight",
    ]:
        assert load("", override).digest() != digest, override


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path):
    kind = StudyConfig if path.stem.startswith("study_") else {"nuclei": NucleiConfig}.get(path.stem, Config)
    assert load_config(path, schema=kind).name


def test_configurations_are_shipped():
    assert CONFIGS


def test_ten_thousand_mistakes_are_told_in_twenty_lines(tmp_path, write_config):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path), [f"data.classes={[0] * 10_000}"])
    told = str(error.value).splitlines()
    assert told[1] == "data.classes.0: input should be a valid string, found 0"
    assert told[-1] == "and 9980 more"
    assert len(told) == 22
