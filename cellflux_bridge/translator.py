"""`Translator`, from which other makers of sequences derive; it lives in `translation.base`."""

from cellflux_bridge.translation.base import Translator

__all__ = ["Translator"]
