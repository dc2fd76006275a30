"""From a section of the configuration to its network."""

from __future__ import annotations

from ..network_config import IFUNetConfig, NetworkConfig, PixelTransformerConfig, UNetConfig
from .if_unet import IFUNet
from .network import Network
from .pixel_transformer import PixelTransformer
from .unet import UNet


def build_network(config: NetworkConfig) -> Network:
    """The network of a stage with new weights. Raises TypeError for a section that describes none."""
    if isinstance(config, UNetConfig):
        return UNet(config)
    if isinstance(config, PixelTransformerConfig):
        return PixelTransformer(config)
    if isinstance(config, IFUNetConfig):
        return IFUNet(config)
    raise TypeError(f"{type(config).__name__} describes no network")
