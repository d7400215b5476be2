"""MHIST: colorectal polyps, hyperplastic or sessile serrated, by the vote of seven pathologists."""

from collections.abc import Iterator

from cellflux_bridge.data.published.base import Download, Patch, Published, number

_VOTES = "Number of Annotators who Selected SSA (Out of 7)"


def _read(download: Download) -> Iterator[Patch]:
    for where, row in download.rows("annotations.csv", "Image Name", "Majority Vote Label", _VOTES, "Partition"):
        score = number(row[_VOTES], where=where, high=7) / 7
        path = f"images/{row['Image Name']}"
        yield Patch(path, row["Majority Vote Label"], row["Partition"], score=score, where=where)


DATASET = Published(
    title="MHIST: hyperplastic polyps (HP) and sessile serrated adenomas (SSA), 224 px",
    source="https://bmirds.github.io/MHIST (after a form)",
    licence="Dataset Research Use Agreement of its authors",
    citation="Wei et al. 2021, arXiv 2101.12355",
    tree="  SRC/annotations.csv\n  SRC/images/MHIST_aaa.png ...",
    read=_read,
    classes=("HP", "SSA"),
    counts={"all": 3152, "train": 2175, "test": 977, "HP": 2162, "SSA": 990},
    scores="share of the seven pathologists who chose SSA",
    unconfirmed="whether images of one slide or patient stand in both splits: no such id is published",
)
