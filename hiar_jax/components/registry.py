"""The kinds of text encoders and autoencoders: `text.kind` and `codec.kind` of an experiment.

A new kind is a config and what it opens (components.interfaces), and a line here. The first is what
a config without `kind` means.
"""

from hiar_jax.components.interfaces import AutoencoderConfig, TextEncoderConfig
from hiar_jax.components.patch_pca import PatchPCAConfig
from hiar_jax.components.umt5_encoder import UMT5TextConfig
from hiar_jax.components.wan_autoencoder import WanCodecConfig
from hiar_jax.components.word_table import WordTableConfig

TEXT_ENCODERS: dict[str, type[TextEncoderConfig]] = {
  "words": WordTableConfig,
  "umt5": UMT5TextConfig,
}
AUTOENCODERS: dict[str, type[AutoencoderConfig]] = {
  "patches": PatchPCAConfig,
  "wan": WanCodecConfig,
}
