"""All times alike."""

from cellflux_bridge.times.base import Times


class Uniform(Times):
    """t ~ U(0, 1), as conditional flow matching is published (Lipman et al. 2023; Tong et al. 2024)."""

    def quantiles(self, shares):
        return shares
