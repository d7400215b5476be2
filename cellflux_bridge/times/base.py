"""What every law of training times has."""

from abc import ABC, abstractmethod

import torch


class Times(ABC):
    """How often a flow trains at each time of its path."""

    @abstractmethod
    def quantiles(self, shares: torch.Tensor) -> torch.Tensor:
        """The quantile function: times (B,) in [0, 1], as parts of the path's interval, below which lie these shares
        (B,) in [0, 1] of all draws. It never falls."""
