"""The verdict: one word by a few figures, the worst of which decides."""

import pytest

from cellflux_bridge.metrics.verdict import verdict

GOOD = {
    ("m", "two_sample_grey_target", 1.0, ""): 0.6,
    ("m", "two_sample_network_target", 1.0, ""): 0.7,
    ("m", "flip_rate", 1.0, "rgb"): 0.9,
    ("m", "flip_rate", 1.0, "grey"): 0.8,
    ("m", "step_unevenness", None, ""): 1.5,
    **{("real target", "flip_rate", None, judge): 0.9 for judge in ("rgb", "grey")},
    **{("real source", "flip_rate", None, judge): 0.1 for judge in ("rgb", "grey")},
}


def of(changes=None):
    values = GOOD | (changes or {})
    return verdict(lambda *key: values.get(key), "m", ["rgb", "grey"], target="B", extractor="seen")


def test_the_worst_of_all_judges_and_tests_is_shown():
    found = of()
    assert found.word == "good"
    assert [figure.value for figure in found.figures] == pytest.approx([0.7, 0.8 / 0.9, 1.5])
    assert found.why == ""
    assert found.figures[0].text == "told from real patches (AUC) 0.70 (0.5 is best, good to 0.8)"


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        (("m", "two_sample_network_target", 1.0, ""), 0.8, "good"),
        (("m", "two_sample_network_target", 1.0, ""), 0.81, "weak"),
        (("m", "two_sample_grey_target", 1.0, ""), 0.96, "not to be used"),
        (("m", "flip_rate", 1.0, "grey"), 0.7, "weak"),
        (("m", "flip_rate", 1.0, "rgb"), 0.4, "not to be used"),
        (("m", "step_unevenness", None, ""), 2.1, "weak"),
        (("m", "step_unevenness", None, ""), 4.1, "not to be used"),
        (("m", "step_unevenness", None, ""), None, "weak"),
    ],
)
def test_limits(key, value, word):
    found = of({key: value})
    assert found.word == word
    assert sum(figure.grade > 0 for figure in found.figures) == (word != "good")


def test_a_judge_that_does_not_know_real_patches_has_no_say():
    found = of({("m", "flip_rate", 1.0, "grey"): 0.1, ("real source", "flip_rate", None, "grey"): 0.3})
    assert found.word == "good"
    assert found.figures[1].value == 1
    none = of({("real target", "flip_rate", None, judge): 0.5 for judge in ("rgb", "grey")})
    assert none.word == "weak"
    assert none.figures[1].text == "called B, where real ones are 1 not known (good from 0.8)"


DAMAGE = {
    ("real target with blur of 1 px", "damage_response", None, "seen"): 3.0,
    ("real target with blends of two patches", "damage_response", None, "seen"): 9.0,
    ("real target with blur of 1 px", "kid_target", None, "seen"): 0.4,
    ("m", "kid_target", 1.0, "seen"): 0.1,
}


@pytest.mark.parametrize(
    ("made", "word", "shown"),
    [
        (0.1, "good", 0.5),
        (0.101, "weak", 0.5025),
        (0.4, "weak", 1),
        (0.41, "not to be used", 1.0124),
        (-0.01, "good", 0),
    ],
)
def test_features_that_see_known_damage_measure_in_blurs_of_a_pixel(made, word, shown):
    found = of(DAMAGE | {("m", "kid_target", 1.0, "seen"): made})
    assert found.word == word
    assert found.figures[1].value == pytest.approx(shown, abs=1e-4)


@pytest.mark.parametrize(
    "lacking",
    [
        {("real target with blur of 1 px", "damage_response", None, "seen"): 2.9},
        {("real target with blends of two patches", "damage_response", None, "seen"): None},
        {("real target with blur of 1 px", "kid_target", None, "seen"): None},
        {("m", "kid_target", 1.0, "seen"): None},
    ],
)
def test_features_that_are_blind_or_not_asked_have_no_say(lacking):
    far = {("m", "kid_target", 1.0, "seen"): 9.0}
    assert of(DAMAGE | far).word == "not to be used"
    found = of(DAMAGE | far | lacking)
    assert (found.word, len(found.figures)) == ("good", 3)
