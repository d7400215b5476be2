"""Stain transfer and augmentation for callers; it lives in `images.stain`."""

from cellflux_bridge.images.stain import *  # noqa: F403
