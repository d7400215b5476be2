from cellflux_bridge.data.phantom.drawing import Phantom, make_phantom

__all__ = ["Phantom", "make_phantom"]
