"""Configuration of Phi-3.5-vision: the stock Phi-3 configuration plus the image side.

Reads the published `config.json` files as they are and writes the same fields back, so that a
saved checkpoint loads in the reference implementation and in servers that read its format.
"""

from __future__ import annotations

import copy
from typing import Any

from .stock import CLIPVisionConfig, Phi3Config

OFFICIAL_REPOSITORY = "microsoft/Phi-3.5-vision-instruct"

# The tower of openai/clip-vit-large-patch14-336, which the published checkpoints use.
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

IMG_PROCESSOR = {
    "image_dim_out": 1024,
    "model_name": "openai/clip-vit-large-patch14-336",
    "name": "clip_vision_model",
    "num_img_tokens": 144,
}

EMBD_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


AUTO_MAP = {
    "AutoConfig": "configuration_phi3_v.Phi3VConfig",
    "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
}


def with_official_repository(auto_map: dict[str, str]) -> dict[str, str]:
    """Point the classes of `auto_map` at the official repository: its code is not beside what we save."""

    def find(target: str) -> str:
        if "--" in target:
            return target
        # the image processor has a file of its own in Phi-3-vision's repository, and none in that of Phi-3.5-vision
        return f"{OFFICIAL_REPOSITORY}--{target.replace('image_processing_phi3_v.', 'processing_phi3_v.')}"

    return {name: find(target) for name, target in auto_map.items()}


class Phi3VConfig(Phi3Config):
    """Phi-3 configuration with an image embedding.

    Args (beyond `Phi3Config`):
        embd_layer: the published description of the image embedding; the only kind implemented is
            the published one (HD transform, learnable separators, sub-images before the global
            view, two-layer projection).
        img_processor: the published description of the tower; `image_dim_out` is its width and
            `layer_idx` (default -2, the second to last) the hidden state that is used.
        vision_config: the tower's size as `CLIPVisionConfig` keywords; what is left out is as in
            CLIP-L/14 at 336 pixels. Absent in the published files.
        image_token_id: the id that stands for one image feature in `input_ids`.

    Raises:
        ValueError: for a rope scaling other than the published one, factor lists of the wrong
            length, or an image embedding of another kind.
    """

    model_type = "phi3_v"

    embd_layer: dict | None = None
    img_processor: dict | None = None
    vision_config: dict | None = None
    image_token_id: int = 32044

    def __post_init__(self, **kwargs: Any) -> None:
        # The attention of the machine where the file was written ("flash_attention_2" in the
        # published files) says nothing about this one: `attn_implementation=` chooses.
        kwargs.pop("_attn_implementation", None)
        if self.vision_config is not None and not isinstance(self.vision_config, dict):
            self.vision_config = self.vision_config.to_dict()
        self.embd_layer = {**EMBD_LAYER, **(self.embd_layer or {})}
        self.img_processor = {**IMG_PROCESSOR, **(self.img_processor or {})}
        super().__post_init__(**kwargs)
        self._check_image_side()

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Read the published `rope_scaling` of type `su`, which transformers calls `longrope`."""
        rope_scaling = kwargs.pop("rope_scaling", None)
        if rope_scaling is not None:
            rope_scaling = copy.deepcopy(dict(rope_scaling))
            kind = rope_scaling.pop("type", rope_scaling.get("rope_type"))
            if kind not in ("su", "longrope"):
                raise ValueError(f'rope_scaling has type "{kind}"; Phi-3.5-vision uses "su" (also called "longrope")')
            rope_scaling["rope_type"] = "longrope"
            head_half = self.hidden_size // self.num_attention_heads // 2
            for name in ("short_factor", "long_factor"):
                length = len(rope_scaling.get(name) or ())
                if length != head_half:
                    raise ValueError(f"rope_scaling.{name} has {length} entries, half a head has {head_half}")
            # stated, so that transformers need not derive it (and warn that it does)
            rope_scaling["factor"] = self.max_position_embeddings / self.original_max_position_embeddings
            kwargs["rope_scaling"] = rope_scaling
        return super().convert_rope_params_to_dict(**kwargs)

    def _check_image_side(self) -> None:
        for key, published in EMBD_LAYER.items():
            if self.embd_layer[key] != published:
                raise ValueError(f"embd_layer.{key} is {self.embd_layer[key]!r}; only {published!r} is implemented")
        tower = self.tower_config()
        if self.img_processor["image_dim_out"] != tower.hidden_size:
            raise ValueError(
                f"img_processor.image_dim_out is {self.img_processor['image_dim_out']}, "
                f"but the tower's hidden_size is {tower.hidden_size}"
            )
        if (tower.image_size, tower.patch_size) != (336, 14):
            raise ValueError(
                f"vision_config has image_size {tower.image_size} and patch_size {tower.patch_size}; "
                "the image embedding needs 336 and 14 (24 x 24 patches)"
            )
        if not -tower.num_hidden_layers - 1 <= self.image_feature_layer < 0:
            raise ValueError(
                f"img_processor.layer_idx is {self.image_feature_layer}; a tower of "
                f"{tower.num_hidden_layers} layers has hidden states -{tower.num_hidden_layers + 1} to -1"
            )

    @property
    def image_feature_layer(self) -> int:
        """Which hidden state of the tower is used, counted from the end (published: -2)."""
        return self.img_processor.get("layer_idx", -2)

    @property
    def num_tower_layers_used(self) -> int:
        """How many of the tower's layers run to reach that hidden state (23 of 24 as published)."""
        return self.tower_config().num_hidden_layers + 1 + self.image_feature_layer

    def tower_config(self) -> CLIPVisionConfig:
        """The stock CLIP configuration of the tower."""
        return CLIPVisionConfig(**{**CLIP_LARGE_336, **(self.vision_config or {})})

    def to_dict(self) -> dict[str, Any]:
        """The configuration with the published field names."""
        fields = super().to_dict()
        rope = fields.pop("rope_parameters", None) or {}
        fields["rope_theta"] = rope.get("rope_theta", 10_000.0)
        fields["rope_scaling"] = None
        if rope.get("rope_type") == "longrope":
            # exactly the three fields that the reference implementation accepts
            fields["rope_scaling"] = {
                "long_factor": list(rope["long_factor"]),
                "short_factor": list(rope["short_factor"]),
                "type": "su",
            }
        if fields.get("vision_config") is None:
            fields.pop("vision_config", None)
        fields["auto_map"] = with_official_repository(fields.get("auto_map") or AUTO_MAP)
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: the published fields, also where a value is a default."""
        fields = super().to_diff_dict()
        if "dtype" in fields:
            fields["torch_dtype"] = fields.pop("dtype")
        # The reference implementation and servers read these without defaults of their own.
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"):
            fields[key] = getattr(self, key)
        return fields
