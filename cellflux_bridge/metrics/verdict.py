"""One word for a method's images, by a few figures and limits that docs/realism.md states."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cellflux_bridge.metrics.damage import BLUR, DAMAGED, MUST_SEE, RESPONSE, SEEN, in_blurs

WORDS = ("good", "weak", "not to be used")
# A judge that recognises fewer real patches of a class has no say.
_GOOD_JUDGE = 0.8
# What is good up to (or from) the first number, and not to be used beyond the second.
TOLD, FAR, ARRIVED, UNEVEN = (0.8, 0.95), (0.5, 1.0), (0.8, 0.5), (2.0, 4.0)

# The value of (method, quantity, level, network), None where there is none.
Find = Callable[[str, str, float | None, str], float | None]


class Deciding(NamedTuple):
    """A figure that decides: its `value`, None where it is not known; `aim` is what would be good; `grade` the place of
    its word in `WORDS`."""

    label: str
    value: float | None
    aim: str
    grade: int

    @property
    def text(self) -> str:
        return f"{self.label} {'not known' if self.value is None else f'{self.value:.2f}'} ({self.aim})"


class Verdict(NamedTuple):
    """`word` is that of the worst of `figures`; what is not known is weak."""

    word: str
    figures: tuple[Deciding, ...]

    @property
    def why(self) -> str:
        """The figures that kept it from being good."""
        return "; ".join(figure.text for figure in self.figures if figure.grade)


def verdict(find: Find, method: str, judges: Sequence[str], *, target: str, extractor: str) -> Verdict:
    """The verdict on the images of `method`.

    Told from real: the larger AUC of the two-sample tests by grey bands and by a small network at level 1 (colour is
    left out, because a camera's noise betrays it in good images, too). By features: the square root of KID to real
    target patches, relative to that of real patches which are blurred by 1 px, where the extractor sees known damage.
    Arrived: the share of images at level 1 that judges call the target, by the judge that says least, divided by the
    share of real target patches that it calls so. Even steps: the largest of the mean changes of pixels from level to
    level over their mean.
    """
    told = [find(method, f"two_sample_{kind}_target", 1.0, "") for kind in ("grey", "network")]
    arrived = []
    for judge in judges:
        of_target, of_source = (find(f"real {end}", "flip_rate", None, judge) for end in ("target", "source"))
        value = find(method, "flip_rate", 1.0, judge)
        if None not in (of_target, of_source, value) and min(of_target, 1 - of_source) >= _GOOD_JUDGE:
            arrived.append(min(1.0, value / of_target))
    figures = (
        _deciding("told from real patches (AUC)", max(_known(told), default=None), TOLD, "0.5 is best, good to"),
        *_by_features(find, method, extractor),
        _deciding(f"called {target}, where real ones are 1", min(arrived, default=None), ARRIVED, "good from"),
        _deciding("largest over mean step", find(method, "step_unevenness", None, ""), UNEVEN, "1 is even, good to"),
    )
    return Verdict(WORDS[max(figure.grade for figure in figures)], figures)


def _by_features(find: Find, method: str, extractor: str) -> list[Deciding]:
    """The figure of an extractor's features; none where it is blind, or was not asked."""
    responses = [find(DAMAGED + name, RESPONSE, None, extractor) for name in MUST_SEE]
    made, blurred = find(method, "kid_target", 1.0, extractor), find(DAMAGED + BLUR, "kid_target", None, extractor)
    if None in (made, blurred, *responses) or min(responses) < SEEN or blurred <= 0:
        return []
    return [_deciding("distance to real patches by features", in_blurs(made, blurred), FAR, f"a {BLUR} is 1, good to")]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _deciding(label: str, value: float | None, limits: tuple[float, float], aim: str) -> Deciding:
    good, last = limits
    sign = 1 if last > good else -1
    grade = 1 if value is None else int(sign * value > sign * good) + int(sign * value > sign * last)
    return Deciding(label, value, f"{aim} {good:g}", grade)
