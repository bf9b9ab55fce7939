"""Phi-3.5-vision: what it adds to the stock Phi-3 decoder and CLIP tower of transformers.

Notation used for tensor shapes
- batch: rows of `input_ids`
- seq: positions of a row, image features included
- images: images of all rows together, in the order of their features in `input_ids`
- crops: 336 x 336 views of all images together; an image's global view, then its sub-images
- rows, columns: an image's sub-images stand in a grid of rows x columns
- width: the tower's hidden size (1024)
- hidden: the decoder's hidden size (3072)
- features: image features of all images together, one per `<|image|>` token
- labelled: positions of all rows together whose next token is to be predicted
- read: positions of the decoder's result that are used; in training the labelled ones
- examples: what the loss is the mean over: the rows, or in a packed batch what the rows hold (see masks.py)

The behaviour is that of the code published with the checkpoints (microsoft/Phi-3.5-vision-instruct);
`tests/test_parity.py` holds it to numbers measured on that code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .configuration import Phi3VConfig
from .masks import document_lengths, packed_attention
from .stock import (
    ROPE_INIT_FUNCTIONS,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    CLIPVisionModel,
    GenerationMixin,
    Phi3DecoderLayer,
    Phi3ForCausalLM,
    Phi3Model,
    Phi3PreTrainedModel,
    Phi3RMSNorm,
    Phi3RotaryEmbedding,
    find_fused_cross_entropy,
)

IGNORED_LABEL = -100
PATCHES_PER_SIDE = 24  # 336 pixels / 14
MERGED_PER_SIDE = PATCHES_PER_SIDE // 2


class Phi3VTower(nn.Module):
    """The stock CLIP vision model, one level down: the published weight names say `vision_model.`.

    Layers past the chosen hidden state are kept, so that they are saved unchanged, but not run.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        tower_config = config.tower_config()
        # a tower has no mask: FlexAttention would have nothing to skip
        flexible = config._attn_implementation == "flex_attention"
        tower_config._attn_implementation = "sdpa" if flexible else config._attn_implementation
        self.vision_model = CLIPVisionModel(tower_config)
        self.num_layers_used = config.num_tower_layers_used
        self.max_crops_per_call: int | None = None

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(crops, 3, 336, 336) -> patch features (crops, 576, width), the class token dropped.

        At most `max_crops_per_call` crops at a time. A frozen tower runs without a graph, so that
        nothing of it is kept for, or recomputed in, the backward pass.
        """
        trains = pixel_values.requires_grad or any(weight.requires_grad for weight in self.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            parts = pixel_values.split(self.max_crops_per_call or len(pixel_values))
            parts = [self.vision_model.pre_layrnorm(self.vision_model.embeddings(part)) for part in parts]
            # Part by part within a layer, not layer by layer within a part: in the backward pass a weight's gradient is
            # held until all its uses have added to it, which would be all layers' at once.
            for layer in self.vision_model.encoder.layers[: self.num_layers_used]:
                parts = [layer(part, None) for part in parts]
            return torch.cat(parts)[:, 1:]


class Phi3VImageEmbedding(nn.Module):
    """Tower, 2x2 merge, learnable separators and projection."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        merged_width = 4 * config.img_processor["image_dim_out"]
        self.img_processor = Phi3VTower(config)
        # ends a row of features; stands between the sub-images and the global view
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged_width))
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged_width))
        self.img_projection = nn.Sequential(
            nn.Linear(merged_width, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Encode all crops of all images in one call.

        Args:
            pixel_values: (crops, 3, 336, 336), per image the global view, then its sub-images row by row.
            image_sizes: (images, 2), each image's padded `[height, width]` in pixels.

        Returns:
            (features, hidden); per image its sub-images' features row by row, a separator, its global view's.

        Raises:
            ValueError: when the crops are not as many as the sizes ask for.
        """
        grids = [(int(height) // 336, int(width) // 336) for height, width in image_sizes.tolist()]
        num_crops = sum(1 + rows * columns for rows, columns in grids)
        if num_crops != pixel_values.shape[0]:
            raise ValueError(f"pixel_values has {pixel_values.shape[0]} crops, image_sizes ask for {num_crops}")
        patches = self.img_processor(pixel_values)
        merged = merge_patches(patches)  # (crops, 576, width) -> (crops, 12, 12, 4 * width)
        sequence, start = [], 0
        for rows, columns in grids:
            global_view, sub_images = merged[start : start + 1], merged[start + 1 : start + 1 + rows * columns]
            start += 1 + rows * columns
            sequence += [
                self._with_row_ends(assemble_grid(sub_images, rows, columns)),
                self.glb_GN[0],
                self._with_row_ends(assemble_grid(global_view, 1, 1)),
            ]
        return self.img_projection(torch.cat(sequence))

    def _with_row_ends(self, grid: torch.Tensor) -> torch.Tensor:
        """(grid rows, grid columns, 4 * width) -> (grid rows * (grid columns + 1), 4 * width)"""
        row_ends = self.sub_GN[0].expand(grid.shape[0], 1, -1)
        return torch.cat([grid, row_ends], dim=1).flatten(0, 1)


def merge_patches(patches: torch.Tensor) -> torch.Tensor:
    """Put every 2x2 square of patches into one feature.

    (crops, 576, width) -> (crops, 12, 12, 4 * width); within a feature: upper left, upper right,
    lower left, lower right.
    """
    crops, _, width = patches.shape
    squares = patches.reshape(crops, MERGED_PER_SIDE, 2, MERGED_PER_SIDE, 2, width)
    return squares.transpose(2, 3).reshape(crops, MERGED_PER_SIDE, MERGED_PER_SIDE, 4 * width)


def assemble_grid(sub_images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(rows * columns, 12, 12, 4 * width) -> (rows * 12, columns * 12, 4 * width), as the image lies."""
    side, merged_width = sub_images.shape[1], sub_images.shape[-1]
    grid = sub_images.reshape(rows, columns, side, side, merged_width)
    return grid.transpose(1, 2).reshape(rows * side, columns * side, merged_width)


class Phi3VRotaryEmbedding(Phi3RotaryEmbedding):
    """LongRoPE with the factors chosen document by document (without packing a row is one document).

    The stock embedding looks at the longest row and gives its factors to the whole batch. A row's
    result would then depend on what it is batched with; here a document past
    `original_max_position_embeddings` takes the long factors and its neighbours keep the short ones.
    """

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (batch, seq) -> cosines and sines, each (batch, seq, head size)."""
        inverse_frequencies = self.original_inv_freq.to(device=x.device, dtype=torch.float)
        if self.rope_type == "longrope":
            is_long = document_lengths(position_ids) > self.config.original_max_position_embeddings  # (batch, seq)
            # (batch, seq, head size / 2)
            inverse_frequencies = torch.where(
                is_long[..., None], self._long_inverse_frequencies(x.device), inverse_frequencies
            )
        angles = position_ids[..., None].float() * inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cosines.to(x.dtype), sines.to(x.dtype)

    def _long_inverse_frequencies(self, device: torch.device) -> torch.Tensor:
        cached = getattr(self, "_long_cache", None)
        if cached is None or cached.device != device:
            past_short = self.config.original_max_position_embeddings + 1
            cached, _ = ROPE_INIT_FUNCTIONS["longrope"](self.config, device, seq_len=past_short)
            self._long_cache = cached
        return cached


class Phi3VRMSNorm(Phi3RMSNorm):
    """The stock norm, except that a float64 model is not rounded to float32 in it.

    Checks of gradients in double precision depend on it.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, hidden) -> (…, hidden)"""
        if hidden_states.dtype != torch.float64:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class Phi3VDecoderLayer(Phi3DecoderLayer):
    """The stock layer; the last one's feed-forward network runs only where its result is read.

    A training step reads it at the labelled positions, a few of a page's thousands. What stands before it
    is of use at every position: its keys and values are what the labelled positions attend to.
    """

    is_last = False

    def forward(
        self, hidden_states: torch.Tensor, read_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(batch, seq, hidden) -> the same; of the last layer (1, read, hidden) where `read_positions` (read,) tells
        which of the batch * seq positions are read.
        """
        if not self.is_last or read_positions is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.resid_attn_dropout(attended)
        # (batch, seq, hidden) -> (1, read, hidden)
        hidden_states = hidden_states.flatten(0, 1).index_select(0, read_positions)[None]
        fed_forward = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.resid_mlp_dropout(fed_forward)


class Phi3VPreTrainedModel(Phi3PreTrainedModel):
    """Loading that never passes over a weight in silence."""

    config_class = Phi3VConfig
    config: Phi3VConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Phi3VDecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]
    # some checkpoints carry a second copy of the token embeddings
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.weight"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """As in transformers, but a weight that is missing, not expected or of another shape is an error that names it.

        Raises:
            ValueError: with the names of the missing, the unexpected and the misshapen weights.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, with their names
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        misshapen = sorted(info.get("mismatched_keys") or ())  # (name, shape in the checkpoint, shape in the model)
        found = info | {
            "mismatched_keys": [f"{name}: {list(one)}, not {list(other)}" for name, one, other in misshapen]
        }
        problems = [
            f"{what} {sorted(map(str, found[key]))}"
            for key, what in (
                ("missing_keys", "weights missing from the checkpoint:"),
                ("unexpected_keys", "weights that this model does not have:"),
                ("mismatched_keys", "weights of another shape:"),
            )
            if found.get(key)
        ]
        if problems:
            raise ValueError(f"{pretrained_model_name_or_path} does not hold a {cls.__name__}: " + "; ".join(problems))
        return (model, info) if wants_info else model


class Phi3VModel(Phi3VPreTrainedModel, Phi3Model):
    """The stock Phi-3 decoder whose `<|image|>` positions take image features."""

    _keys_to_ignore_on_load_unexpected = [*Phi3VPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.rotary_emb = Phi3VRotaryEmbedding(config)
        for module in self.modules():
            # made by the stock decoder and its layers, which take no other classes
            if type(module) is Phi3RMSNorm:
                module.__class__ = Phi3VRMSNorm
            elif type(module) is Phi3DecoderLayer:
                module.__class__ = Phi3VDecoderLayer
        self.layers[-1].is_last = True
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, image_sizes: torch.Tensor | None
    ) -> torch.Tensor:
        """input_ids (batch, seq) and the images -> (batch, seq, hidden).

        Raises:
            ValueError: when the `<|image|>` tokens and the image features are not equally many.
        """
        inputs_embeds = self.embed_tokens(input_ids)
        is_image = input_ids == self.config.image_token_id
        num_placeholders, num_features = int(is_image.sum()), 0
        if pixel_values is not None:
            features = self.vision_embed_tokens(pixel_values, image_sizes)
            num_features = features.shape[0]
        if num_placeholders != num_features:
            raise ValueError(
                f"input_ids has {num_placeholders} <|image|> tokens (id {self.config.image_token_id}), "
                f"the images give {num_features} features"
            )
        if num_features == 0:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_image[..., None], features.to(inputs_embeds.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        read_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (batch, seq).
            attention_mask: (batch, seq), 1 where a token is real.
            position_ids: (batch, seq); derived from the mask where absent.
            inputs_embeds: (batch, seq, hidden), instead of `input_ids`; takes no images.
            pixel_values: (crops, 3, 336, 336).
            image_sizes: (images, 2) as `[height, width]`.
            branch_ids: (batch, seq), given with `position_ids` where rows are packed: see masks.py.
            read_positions: (read,), which of the batch * seq positions are read of the result; absent: all.

        Returns:
            `last_hidden_state` (batch, seq, hidden), or (1, read, hidden), and the cache (packed rows have none).
        """
        if branch_ids is not None:
            if position_ids is None or attention_mask is not None or past_key_values is not None or use_cache:
                raise ValueError("packed rows (branch_ids) need position_ids, and take neither mask nor cache")
            use_cache = False
            # before the images, for which a GPU takes long: what follows would wait for its answer
            dtype = self.dtype if inputs_embeds is None else inputs_embeds.dtype
            packed = packed_attention(self.config._attn_implementation, position_ids, branch_ids, dtype)
            attention_mask, kwargs = packed.pop("attention_mask"), kwargs | packed
        if inputs_embeds is None and input_ids is not None:
            has_cache = past_key_values is not None and past_key_values.get_seq_length() > 0
            if has_cache and pixel_values is None:
                inputs_embeds = self.embed_tokens(input_ids)  # a generated token, even <|image|>, is just a token
            else:
                inputs_embeds = self.embed(input_ids, pixel_values, image_sizes)
        elif pixel_values is not None:
            raise ValueError("pixel_values go with input_ids: inputs_embeds has no <|image|> tokens to replace")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Left-padded rows count their positions from their first real token, as when unpadded.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            read_positions=read_positions,
            **kwargs,
        )


class Phi3VForCausalLM(Phi3VPreTrainedModel, Phi3ForCausalLM):
    """`Phi3VModel` with the language-model head, `generate`, and the recipe's loss."""

    # Tells transformers' Trainer that the loss is a mean over examples already: it must average over
    # micro-batches and not count label tokens, which would weight long answers more.
    accepts_loss_kwargs = False
    fuses_loss = True  # where many positions are labelled and Liger's kernel is there
    # From so many labelled positions on their logits (at 32,064 a position) are worth a fused loss: 0.4 GB in all.
    fuses_loss_from = 1024

    def __init__(self, config: Phi3VConfig) -> None:
        super(Phi3ForCausalLM, self).__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; with `labels`, compute the recipe's loss.

        Args:
            labels: (batch, seq), the ids to predict, -100 where there is nothing to learn. Given,
                only the labelled positions pass through the head: `logits` is then None, for a
                training step never needs the (batch, seq, vocabulary) tensor.
            loss_weights: (examples,), what each example's loss counts; 1 where absent.
            logits_to_keep: the last positions to return logits for (0: all), or their indices.
            Others: see `Phi3VModel.forward`.

        Returns:
            `loss`: the mean over examples of `loss_weights` times the example's mean over its own
            labelled positions (each counts once, however long its answer); `logits` (batch, kept
            positions, vocabulary) without labels; the cache. With labels, the last of `hidden_states`
            that were asked for is (1, labelled, hidden).
        """
        read_positions = None
        if labels is not None:
            use_cache = bool(use_cache)  # absent: nothing is generated from a training step
            is_read = F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))  # position p predicts token p + 1
            read_positions = is_read.flatten().nonzero()[:, 0]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            branch_ids=branch_ids,
            read_positions=read_positions,
            **kwargs,
        )
        loss = logits = None
        if read_positions is not None:
            if branch_ids is None:  # a row is an example
                branch_ids = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
            predicted = read_positions + 1
            targets, examples = labels.flatten()[predicted], branch_ids.flatten()[predicted]  # (labelled,)
            num_examples = int(branch_ids.max()) + 1 if loss_weights is None else len(loss_weights)
            token_losses = self._token_losses(outputs.last_hidden_state[0], targets)
            loss = mean_over_examples(token_losses, examples, num_examples, loss_weights)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _token_losses(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden_states (labelled, hidden), targets (labelled,) -> cross-entropies (labelled,), in float32 at least."""
        head = self.lm_head
        # a head that is adapted, or whose weight lies in pieces on other processes, must be called
        is_plain = type(head) is nn.Linear and head.weight.shape[0] == self.vocab_size
        if self.fuses_loss and is_plain and len(targets) >= self.fuses_loss_from:
            fused_token_losses = find_fused_cross_entropy(hidden_states.device.type)
            if fused_token_losses is not None:
                return fused_token_losses(hidden_states, head, targets)
        logits = head(hidden_states)  # (labelled, vocabulary)
        loss_dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(loss_dtype), targets, reduction="none")

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass the images with the first step only, and start over where a row's rope factors change.

        A row that grows past `original_max_position_embeddings` takes the long factors; what the
        cache holds of it was made with the short ones, so that step runs the whole input again.
        """
        threshold = self.config.original_max_position_embeddings
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            if attention_mask is None:
                crossing = input_ids.shape[1] == threshold + 1
            else:
                crossing = bool((attention_mask.sum(-1) == threshold + 1).any())
            if crossing:
                past_key_values, is_first_iteration = None, True
                kwargs["next_sequence_length"] = None
                kwargs.pop("position_ids", None)  # derived from the mask again, for every position
        inputs = GenerationMixin.prepare_inputs_for_generation(
            self,
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        has_cache = past_key_values is not None and past_key_values.get_seq_length() > 0
        if has_cache and not is_first_iteration:
            inputs.pop("pixel_values", None)
            inputs.pop("image_sizes", None)
        else:
            # without a cache every step encodes the whole input, images included
            for name in ("pixel_values", "image_sizes"):
                if kwargs.get(name) is not None:
                    inputs[name] = kwargs[name]
        return inputs


def mean_over_examples(
    token_losses: torch.Tensor, examples: torch.Tensor, num_examples: int, loss_weights: torch.Tensor | None
) -> torch.Tensor:
    """Losses (labelled,) and the example that each is of (labelled,) -> the mean of the examples' weighted means."""
    zeros = token_losses.new_zeros(num_examples)
    counts = zeros.index_add(0, examples, torch.ones_like(token_losses))
    example_losses = zeros.index_add(0, examples, token_losses) / counts.clamp(min=1)
    if loss_weights is not None:
        example_losses = example_losses * loss_weights.to(example_losses.dtype)
    return example_losses.mean()
