"""`UserError`, which callers catch; it lives in `base.errors`."""

from cellflux_bridge.base.errors import UserError

__all__ = ["UserError"]
