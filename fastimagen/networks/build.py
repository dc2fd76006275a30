"""From a section of the configuration to its network."""

from __future__ import annotations

from ..network_config import IFUNetConfig, LoraConfig, NetworkConfig, PixelTransformerConfig, UNetConfig
from .if_unet import IFUNet
from .lora import add_lora
from .network import Network
from .pixel_transformer import PixelTransformer
from .unet import UNet


def build_network(config: NetworkConfig, lora: LoraConfig | None = None) -> Network:
    """The network of a stage with new weights, with adapters if `lora` describes some.

    Raises TypeError for a section that describes no network, ValueError for adapters that it cannot have.
    """
    network = _build(config)
    if lora is not None:
        add_lora(network, lora)
    return network


def _build(config: NetworkConfig) -> Network:
    if isinstance(config, UNetConfig):
        return UNet(config)
    if isinstance(config, PixelTransformerConfig):
        return PixelTransformer(config)
    if isinstance(config, IFUNetConfig):
        return IFUNet(config)
    raise TypeError(f"{type(config).__name__} describes no network")
