"""One typed schema of a run: what every other module imports of it."""

_OF_ROOT = ("PLACES_AND_PACE", "Config", "Root", "load_config", "merged", "parse_overrides", "split_overrides")


def __getattr__(name: str):
    # On first use: the root assembles the sections of all rooms, which import this package.
    if name in _OF_ROOT:
        from cellflux_bridge.config import root

        return getattr(root, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
