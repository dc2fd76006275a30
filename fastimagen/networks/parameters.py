"""Which parameters of a network the Muon optimizer updates."""

from __future__ import annotations

from torch import nn

from .conditioning import TextConditioning, TimeEmbedding
from .convolution import MatrixWeights
from .if_unet import EmbeddingMLP, TextVector
from .layers import Film
from .network import Network
from .pixel_transformer import TimeVector


def muon_parameters(network: Network) -> set[str]:
    """Names of the parameters that Muon updates: weight matrices of linear layers and convolutions.

    Muon orthogonalizes updates, which is meant for matrices that map one feature space to another (Jordan et al.
    2024, "Muon: an optimizer for hidden layers"). Adam updates all other parameters: biases, norms, null tokens, null
    keys and values, pooled queries and scales per channel. Like the embedding layers of that source, the layers that
    act on the time embedding and on the pooled text also stay with Adam: their input is one vector per sample. Frozen
    parameters are in no optimizer."""
    vector_layers: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, (TimeEmbedding, TimeVector, Film, EmbeddingMLP, TextVector)):
            vector_layers.update(module.modules())
        elif isinstance(module, TextConditioning):
            vector_layers.update(module.pooled_embedding.modules())
    return {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, MatrixWeights))
        and module not in vector_layers
        and module.weight.requires_grad
    }
