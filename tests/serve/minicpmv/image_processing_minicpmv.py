"""What a MiniCPM-V checkpoint carries as code, reduced to what vLLM asks of it: one unsliced image, resized and cut into patches."""

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


class MiniCPMVImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' contract

    def __init__(self, max_slice_nums=1, scale_resolution=112, patch_size=14, image_feature_size=16, use_image_id=True, **others):
        super().__init__(**others)
        self.max_slice_nums, self.scale_resolution, self.patch_size = max_slice_nums, scale_resolution, patch_size
        self.image_feature_size, self.use_image_id, self.slice_mode, self.version = image_feature_size, use_image_id, True, 2.0

    def get_sliced_grid(self, image_size, max_slice_nums=None, nerver_split=False):
        return None

    def get_slice_image_placeholder(self, image_size, image_idx=0, max_slice_nums=None, use_image_id=None):
        number = f"<image_id>{image_idx}</image_id>" if use_image_id else ""
        return number + "<im_start>" + "<unk>" * self.image_feature_size + "<im_end>"

    def preprocess(self, images, do_pad=True, max_slice_nums=None, return_tensors=None, **others):
        images = images if isinstance(images, list | tuple) else [images]
        batches = images if not images or isinstance(images[0], list | tuple) else [images]
        count = self.scale_resolution // self.patch_size
        grid = torch.tensor([count, count], dtype=torch.int32)
        return BatchFeature(data={
            "pixel_values": [[self._patches(image) for image in batch] for batch in batches],
            "image_sizes": [[tuple(image.size) for image in batch] for batch in batches],
            "tgt_sizes": [torch.stack([grid] * len(batch)) if batch else torch.zeros(0, 2, dtype=torch.int32) for batch in batches],
        })  # fmt: skip

    def _patches(self, image):
        """[3, patch, patch x count], as the model's convolution reads it."""
        size, patch = self.scale_resolution, self.patch_size
        pixels = np.asarray(image.convert("RGB").resize((size, size)), dtype=np.float32) / 127.5 - 1
        cut = torch.nn.functional.unfold(torch.from_numpy(pixels).permute(2, 0, 1)[None], (patch, patch), stride=(patch, patch))
        return cut.reshape(3, patch, patch, -1).permute(0, 1, 3, 2).reshape(3, patch, -1)
