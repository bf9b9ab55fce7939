"""Phi-3.5-vision (and Phi-3-vision) on the stock Phi-3 and CLIP parts of transformers.

Importing this package registers the classes with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained(folder)` works on a published or a saved checkpoint
without any remote code.
"""

from .configuration import Phi3VConfig
from .image_processing import Phi3VImageProcessor
from .modeling import Phi3VForCausalLM, Phi3VModel
from .processing import Phi3VProcessor
from .stock import register_with_auto_classes

register_with_auto_classes(Phi3VConfig, Phi3VModel, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor)

__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VModel", "Phi3VProcessor"]
