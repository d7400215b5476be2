"""Frozen vectors of the classes, such as fingerprints of compounds, so that a network can go to unseen ones."""

import csv
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import csv_rows
from cellflux_bridge.condition.base import Part, begin_at_one
from cellflux_bridge.config.schema import Count

_MORGAN_RADIUS = 2


class Embedding(Part):
    """The vectors of a table, weighed by the target's soft label, and projected: a class is its vector, a level between
    two classes lies between theirs.

    `table` is a CSV file (in data.root, if its path is relative) whose first column names classes; the others are the
    `dimension` numbers of each vector. A single other column `smiles` is turned into Morgan fingerprints of radius 2
    and `dimension` bits (Rogers & Hahn 2010), for which RDKit must be installed. Vectors are scaled together to a mean
    square of 1 and travel with the network's weights, so that the table is read in training only. Classes in `without`,
    such as the control, have no vector: for them the part is absent. `condition.target=class` has learned vectors
    instead.
    """

    name, field, optional, of_target = "embedding", "target_level", True, True

    def __init__(self, names, channels, *, table: Path, dimension: Count, without: list[str] = []):  # noqa: B006
        super().__init__(names, channels)
        if unknown := [label for label in without if label not in names.classes]:
            raise UserError(f"condition.parts, embedding.without: no class {unknown[0]!r}")
        self._table, self._dimension = names.root / table.expanduser(), dimension
        self._without = [names.classes.index(label) for label in without]

    def is_present(self, fields) -> torch.Tensor:
        return fields["target_level"][:, self._without].sum(1) < 1 - 1e-4

    def embedding(self, width):
        return _Vectors(self.num_classes, self._dimension, width)

    def prepare(self, embedding):
        """UserError for a table that cannot be read, lacks a class, or has another dimension."""
        rows = _vectors(self._table, self._dimension)
        labels = {i: label for i, label in enumerate(self.names.classes) if i not in self._without}
        if missing := [label for label in labels.values() if label not in rows]:
            raise UserError(
                f"{self._table}: has no row for {len(missing)} of {len(labels)} classes: {abbreviate(missing)}; add "
                "them, or name classes without a vector (the control) in the part's `without`"
            )
        vectors = np.stack([rows[label] for label in labels.values()])
        if not (size := np.sqrt(np.square(vectors).mean())):
            raise UserError(f"{self._table}: all vectors are zero")
        embedding.vectors[list(labels)] = torch.from_numpy(vectors / size).float().to(embedding.vectors)


class _Vectors(nn.Module):
    def __init__(self, num_classes: int, dimension: int, width: int):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_classes, dimension))
        self.project = begin_at_one(nn.Linear(dimension, width))

    def forward(self, label: torch.Tensor) -> torch.Tensor:
        return self.project(label.to(self.vectors) @ self.vectors)


def _vectors(table: Path, dimension: int) -> dict[str, np.ndarray]:
    """The vector (dimension,) float64 of each name in a table."""
    found, columns = {}, 0
    try:
        for number, row in enumerate(csv_rows(table), start=2):
            name, *cells = row.values()
            columns = len(cells)
            if name in found:
                raise UserError(f"{table}, row {number}: {name!r} stands twice")
            if list(row)[1:] == ["smiles"]:
                found[name] = _fingerprint(cells[0], dimension, where=f"{table}, row {number}")
            elif columns == dimension:
                found[name] = np.array(cells, np.float64)
            if name in found and not np.isfinite(found[name]).all():
                raise ValueError(f"row {number} holds NaN or infinite numbers")
    except (OSError, UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{table}: cannot be read as a table of vectors, a name and numbers a row ({error})") from error
    if not found:
        raise UserError(
            f"{table}: has vectors of {columns} numbers, the configuration says dimension={dimension}; correct it there"
        )
    return found


def _fingerprint(smiles: str, bits: int, *, where: str) -> np.ndarray:
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
    except ImportError as error:
        raise UserError("SMILES need RDKit; run: pip install 'cellflux-bridge[chem]'") from error
    RDLogger.DisableLog("rdApp.*")
    if (molecule := Chem.MolFromSmiles(smiles)) is None:
        raise UserError(f"{where}: {smiles!r} is no SMILES that RDKit can read")
    return GetMorganGenerator(radius=_MORGAN_RADIUS, fpSize=bits).GetFingerprintAsNumPy(molecule).astype(np.float64)
