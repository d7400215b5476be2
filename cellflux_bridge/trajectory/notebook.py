"""A trajectory in a notebook: its sequences beneath each other, and a slider that takes them through the levels."""

import base64
import html
import io

import numpy as np
from PIL import Image

from cellflux_bridge.images import sheet, to_rgb

# Sequences beside each other at most, and px of a tile's longer side.
_MOST, _TILE = 8, 128


def slider(trajectory) -> str:
    """HTML of the first eight sequences, a picture a level, and a slider between levels; nothing is fetched."""
    header, count = trajectory.header, min(_MOST, len(trajectory.source_ids))
    scale, pictures = max(1, _TILE // max(trajectory.frames.shape[-2:])), []
    for k, level in enumerate(trajectory.levels):
        row = [np.ascontiguousarray(to_rgb(trajectory.frames[k, b].transpose(1, 2, 0))) for b in range(count)]
        text = io.BytesIO()
        Image.fromarray(sheet([row], scale=scale)).save(text, "PNG")
        uri = base64.b64encode(text.getvalue()).decode()
        hidden = "" if k == 0 else " hidden"
        pictures.append(f'<img alt="level {level:g}" src="data:image/png;base64,{uri}" style="max-width:100%"{hidden}>')
    shown = (
        "const all=this.parentElement.querySelectorAll('img');"
        "all.forEach((e,k)=>e.hidden=k!=this.value);this.nextElementSibling.textContent=all[this.value].alt"
    )
    last, names = len(pictures) - 1, html.escape(f"{header.source} → {header.target}, {header.method}")
    return (
        f"<div><div>{names}: {count} of {len(trajectory.source_ids)} sequences</div>{''.join(pictures)}<br>"
        f'<input type="range" min="0" max="{last}" value="0" oninput="{shown}" aria-label="level"> '
        f"<span>level 0</span></div>"
    )
