"""`cellflux-bridge translate`"""

import argparse
from pathlib import Path

from cellflux_bridge.cli.places import configuration, holds_ddim


def run(args: argparse.Namespace) -> None:
    """translate RUN: translate held-out patches of one class to another, level by level; or your own images.

    Instead of RUN, a YAML file can name weights of a reference bridge that were trained elsewhere.
    """
    where = Path(args.config)
    if where.is_file():
        config = configuration(args.config, args.overrides)
        # A file that names weights is a reference bridge itself; another one stands for the run that it made.
        where = where if config.ddim.denoiser.weights is not None else config.output
    if where.is_file() or holds_ddim(where):
        from cellflux_bridge.translation.ddim import DDIMTranslator as Kind
    else:
        from cellflux_bridge.api import Bridge as Kind

    translator = Kind.load(where, args.overrides)
    options = {"source": args.source, "target": args.target, "output": args.output, "overwrite": args.overwrite}
    if args.images is None:
        folder, figures = translator.translate_split(**options)
    else:
        folder, figures = translator.translate_images(args.images, **options)
    made = figures["made_now"]
    pace = f", {figures['seconds'] / made:.3f} s each" if made else ""
    translator.fabric.print(f"sequences: {folder} ({figures['sequences']}, {made} made now{pace})")
