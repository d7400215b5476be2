"""A GPU that is none: tensors of the CPU of which some pretend to be on it, so that a mismatch shows on any machine."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
_CROSSING = ("to", "copy_", "type_as", "__set__", "_has_compatible_shallow_copy_type")


class PretendedGPU(TorchFunctionMode):
    """On the GPU is what was made with its device or moved to it, and what came of such tensors.

    A RuntimeError where such a tensor meets one that is not, unless that is a number or an index; a TypeError where one
    is made an array without having come back.
    """

    def __init__(self):
        super().__init__()
        self._there = WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if func == torch.Tensor.device.__get__:
            return GPU if args[0] in self._there else CPU
        if name == "_parse_to":  # of modules, which move their parameters one by one
            return func(*args, **kwargs)
        if name in ("numpy", "__array__") and args[0] in self._there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        self._require_one_device(name, tensors, args)
        device = CPU if name == "cpu" else self._asked_for(name, args, kwargs)
        found = func(*self._without_device(args), **self._without_device(kwargs))
        is_there = any(t in self._there for t in tensors) if device is None else device.type == "cuda"
        if name == "__set__":
            found, is_there = args[0], args[1] in self._there
        elif name == "copy_":
            is_there = args[0] in self._there
        elif device is not None and tensors and found is args[0] and is_there != (found in self._there):
            found = found.clone()  # moved
        return tree_map_only(torch.Tensor, self._put if is_there else self._keep, found)

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        self._there[tensor] = True
        return tensor

    @staticmethod
    def _keep(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _asked_for(self, name: str, args, kwargs) -> torch.device | None:
        """The device that a call names, as an argument or by a tensor in whose manner another is made."""
        if kwargs.get("device") is not None:
            return torch.device(kwargs["device"])
        for value in args[1:] if name in ("to", "type_as") else ():
            if isinstance(value, torch.device | str):
                return torch.device(value)
            if isinstance(value, torch.Tensor):
                return GPU if value in self._there else CPU
        return None

    @staticmethod
    def _without_device(arguments):
        return tree_map_only(torch.device, lambda device: CPU, arguments)

    def _require_one_device(self, name: str, tensors, args) -> None:
        if name in _CROSSING:
            return
        if name == "__getitem__":  # an index may come from the CPU, but not from the GPU into the CPU
            tensors = [args[0]] if args[0] in self._there else tensors
        elif name == "__setitem__":
            tensors = [value for value in (args[0], args[2]) if isinstance(value, torch.Tensor)]
        there = [t in self._there for t in tensors if t in self._there or t.dim() > 0]
        if any(there) and not all(there):
            raise RuntimeError(f"{name}: tensors on two devices, cuda:0 and cpu")
