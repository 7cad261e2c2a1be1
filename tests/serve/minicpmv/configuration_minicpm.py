"""What a MiniCPM-V checkpoint carries as code, reduced to what vLLM asks of it: the configuration."""

from transformers import LlamaConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig


class MiniCPMVConfig(LlamaConfig):
    model_type = "minicpmv"

    def __init__(self, query_num=16, image_size=448, vision_config=None, version=4.0, slice_mode=True, use_image_id=True, **others):
        self.query_num, self.image_size, self.version, self.slice_mode = query_num, image_size, version, slice_mode
        self.use_image_id, self.drop_vision_last_layer, self.batch_vision_input, self.vision_batch_size = use_image_id, False, True, 16
        ready = isinstance(vision_config, SiglipVisionConfig)
        self.vision_config = vision_config if ready else SiglipVisionConfig(**(vision_config or {}))
        self.patch_size = self.vision_config.patch_size
        super().__init__(**others)
