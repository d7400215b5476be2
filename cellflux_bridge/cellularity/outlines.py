"""Single nuclei of an image as a table, and as GeoJSON that QuPath opens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from skimage.measure import find_contours, regionprops

from cellflux_bridge.base.files import csv_text, replace_text
from cellflux_bridge.cellularity.measurement import eccentricities, haematoxylin_amount

_COLUMNS = ("nucleus", "x", "y", "area", "eccentricity", "darkness", "polygon")


def nuclei_table(rgb: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Of every nucleus of an RGB uint8 image (H, W, 3) with a label map (H, W): its number, centroid (x, y), area in
    px, eccentricity, mean haematoxylin concentration, and outline, [[x, y], ...], closed.

    Coordinates are in px from the upper left corner of the image, so the middle of its first pixel is (0.5, 0.5). Of a
    nucleus in several pieces the outline is that of the largest.
    """
    rows, eccentricity = [], eccentricities(labels)
    for region in regionprops(labels):
        top, left = region.bbox[:2]
        inside = region.image
        # Around the pixels and not through them, so that a nucleus of one pixel has an outline, too.
        contour = max(find_contours(np.pad(inside, 1).astype(float), 0.5), key=len)
        outline = np.round(contour[:, ::-1] + (left - 0.5, top - 0.5), 2)
        row, column = region.centroid
        amount = haematoxylin_amount(rgb[region.slice][inside])
        rows.append(
            {
                "nucleus": region.label,
                "x": round(column + 0.5, 2),
                "y": round(row + 0.5, 2),
                "area": int(region.area),
                "eccentricity": round(float(eccentricity[region.label]), 4),
                "darkness": round(float(amount.mean()), 4),
                "polygon": outline.tolist(),
            }
        )
    return rows


def write_nuclei(file: Path, rgb: np.ndarray, labels: np.ndarray) -> None:
    """Write `file`.csv (polygon: "x y; x y; ...") and `file`.geojson (a FeatureCollection of QuPath's detections)."""
    table = nuclei_table(rgb, labels)
    cells = [[*list(row.values())[:-1], "; ".join(f"{x:g} {y:g}" for x, y in row["polygon"])] for row in table]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [row["polygon"]]},
            "properties": {
                "objectType": "detection",
                "classification": {"name": "Nucleus"},
                "measurements": {name: row[name] for name in ("area", "eccentricity", "darkness")},
            },
        }
        for row in table
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file.with_name(f"{file.name}.csv"), csv_text([_COLUMNS, *cells]))
    collection = {"type": "FeatureCollection", "features": features}
    replace_text(file.with_name(f"{file.name}.geojson"), json.dumps(collection) + "\n")
