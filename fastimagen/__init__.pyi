"""What type checkers and editors see of the names that __init__.py imports when they are first used."""

from .cascade import Cascade as Cascade
from .config import CascadeConfig as CascadeConfig
from .network_config import UNetConfig as UNetConfig
from .networks.unet import UNet as UNet
from .sampling.pipeline import ImagenPipeline as ImagenPipeline
from .sampling.request import SamplingRequest as SamplingRequest
from .text.embeddings import TextEmbeddings as TextEmbeddings
from .text.t5 import T5Encoder as T5Encoder
from .train.ema import EMA as EMA
from .train.trainer import Trainer as Trainer

__version__: str
