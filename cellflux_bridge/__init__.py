"""cellflux_bridge: learn how tissue of class A becomes tissue of class B, and watch it happen."""

__version__ = "0.1.0"
__all__ = ["Bridge", "__version__"]


def __getattr__(name: str):
    # Imported on first use, so that the command line can print its help without importing torch.
    if name == "Bridge":
        from cellflux_bridge.api import Bridge

        return Bridge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
