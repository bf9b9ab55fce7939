"""A checkpoint -> processor and model, ready for full, frozen-vision, LoRA or QLoRA training."""

from __future__ import annotations

import argparse
import gc
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, BitsAndBytesConfig, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .cli import choose_precision
from .data import one_line
from .errors import NotLookedAtError, UserError, about_to_fetch, is_out_of_memory, try_all
from .files import read_json
from .layers import compile_layers, recompute_layers, use_kernels_for_any_length, use_liger_kernels
from .phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from .phi3v.stock import extract_commit_hash, find_file

LORA_OPTIONS = ("lora_rank", "lora_alpha_ratio", "lora_dropout")
END_TOKENS = ("<|end|>", "<|endoftext|>")

# The modules that LoRA adapts, as published; layers of the tower that are never run are left out.
DECODER = r"model\.layers\.\d+\."
VISION = r"model\.vision_embed_tokens\."
DECODER_LINEARS = (r"self_attn\.qkv_proj", r"self_attn\.o_proj", r"mlp\.gate_up_proj", r"mlp\.down_proj")
DECODER_TARGETS = (*(DECODER + name for name in DECODER_LINEARS), "lm_head")
PROJECTION_TARGETS = (VISION + r"img_projection\.0", VISION + r"img_projection\.2")
TOWER_LINEARS = (*(rf"self_attn\.{name}_proj" for name in ("q", "k", "v", "out")), r"mlp\.fc1", r"mlp\.fc2")


def check_checkpoint(options: argparse.Namespace) -> None:
    """Find out, before any weight is read, whether `--model_name_or_path` can be used with these options.

    `options.revision` becomes the commit that a hub id's branch or tag is at now, so that all that is read of it is of
    the same one, and the output folder says which.

    Raises:
        UserError: nothing there, another model type, an adapter that the options do not go on training.
    """
    adapter = find_adapter(options.model_name_or_path, options.revision)
    options.revision = commit_of(options.model_name_or_path, options.revision)
    if adapter is None:

        def check_weights() -> None:
            _check_files(options.model_name_or_path)
            _read_processor(options.model_name_or_path, options.revision)

        try_all(lambda: _check_lora_options(options), check_weights)
        return
    stored = read_adapter(adapter)
    base, revision = stored["base_model_name_or_path"], stored.get("revision")

    def check_base() -> None:
        find_adapter(base, revision)  # it must be there, too
        _check_files(base)
        _read_processor(base, revision)

    try_all(
        lambda: _check_training_further(adapter, stored, options),
        lambda: _names_in_adapter(options.model_name_or_path, options.revision),
        check_base,
    )


def _check_lora_options(options: argparse.Namespace) -> None:
    if options.use_lora or options.eval_only:
        return
    given = [f"--{name}" for name in LORA_OPTIONS if name in options.given]
    if given:
        raise UserError(
            f"{', '.join(given)}: of adapters, and all weights are to be trained: add --use_lora or --use_qlora, or "
            f"leave {'it' if len(given) == 1 else 'them'} out"
        )


def _check_training_further(adapter: Path, stored: dict[str, Any], options: argparse.Namespace) -> None:
    # an adapter is evaluated in the precision of adapter training
    options.use_lora = True
    options.method = "qlora" if options.use_qlora else "lora"
    options.precision = choose_precision(options)
    if options.eval_only:
        return
    missing = [name for name in ("r", "lora_alpha", "lora_dropout", "target_modules") if stored.get(name) is None]
    if missing:
        raise UserError(f"{adapter} has no {', no '.join(missing)}: such an adapter cannot be trained further")
    if options.output_dir.resolve() == Path(stored["base_model_name_or_path"]).resolve():
        raise UserError(f"--output_dir {options.output_dir} is the base of the adapter to train: choose another")
    given = {
        "--lora_rank": (options.lora_rank, stored["r"]),
        "alpha (--lora_rank x --lora_alpha_ratio)": (adapter_alpha(options), stored["lora_alpha"]),
        "--lora_dropout": (options.lora_dropout, stored["lora_dropout"]),
        "--freeze_vision_model": (options.freeze_vision_model, not _adapts_vision(stored["target_modules"])),
    }
    wrong = [f"{name} {mine}, the adapter has {its}" for name, (mine, its) in given.items() if mine != its]
    if wrong:
        raise UserError(
            f"--model_name_or_path {options.model_name_or_path} is an adapter: to train it further give its own values "
            f"({'; '.join(wrong)}), or add --eval_only"
        )


def read_adapter(file: Path) -> dict[str, Any]:
    """What an adapter's `adapter_config.json` says.

    Raises:
        UserError: it is cut off, names no base, or is of another kind than LoRA.
    """
    stored = read_json(file)
    if stored is None or not isinstance(stored.get("base_model_name_or_path"), str):
        raise UserError(f"{file} is cut off, or names no base (base_model_name_or_path): fetch the adapter anew")
    if stored.get("peft_type") != "LORA":
        raise UserError(f"{file} is of a {stored.get('peft_type')} adapter: only LoRA's are known here")
    return stored


def _names_in_adapter(name_or_path: str, revision: str | None) -> set[str]:
    """The names of an adapter's weights, of which nothing but the file's head is read.

    Raises:
        UserError: there is no such file, or it is cut off.
    """
    file = _find_file(name_or_path, "adapter_model.safetensors", revision)
    if file is None:  # PEFT would take a pickled one
        raise UserError(f"--model_name_or_path {name_or_path} is an adapter without adapter_model.safetensors")
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): fetch the adapter anew") from error


def _adapts_vision(targets: str | list[str]) -> bool:
    """Whether an adapter's `target_modules` are of the image side too: a pattern, or names, as published."""
    names = [targets] if isinstance(targets, str) else targets
    return any(part in name for name in names for part in ("vision_embed_tokens", "img_projection", "fc1"))


def adapter_alpha(options: argparse.Namespace) -> int:
    """LoRA's alpha, as published: rank x ratio, rounded."""
    return round(options.lora_rank * options.lora_alpha_ratio)


def _check_files(name_or_path: str) -> None:
    """A local checkpoint's files, before anything is read of them; a hub's are reported when they are fetched."""
    folder = Path(name_or_path)
    if not folder.exists():
        return
    missing = [name for name in ("preprocessor_config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise UserError(
            f"--model_name_or_path {folder} is not a complete checkpoint: it has no {', no '.join(missing)}"
        )


def commit_of(name_or_path: str, revision: str | None) -> str | None:
    """The commit of a hub's checkpoint or adapter, which was found before; None for a folder."""
    for name in ("config.json", "adapter_config.json"):
        file = _find_file(name_or_path, name, revision)
        if file is not None and not Path(name_or_path).exists():
            return extract_commit_hash(file, None)
    return None


def _find_file(name_or_path: str, file: str, revision: str | None) -> str | None:
    """A file of a checkpoint, of a hub's fetched; None where it has none.

    Raises:
        NotLookedAtError: it would have to be fetched, while something is known to be wrong.
    """
    if not Path(name_or_path).exists():
        about_to_fetch()
    return find_file(name_or_path, file, revision=revision, _raise_exceptions_for_missing_entries=False)


def find_adapter(name_or_path: str, revision: str | None = None) -> Path | None:
    """The `adapter_config.json` of an adapter; None for a checkpoint of the whole model.

    Args:
        name_or_path: hub id or folder.
        revision: of a hub id: a commit, branch or tag; None is its main branch.

    Raises:
        UserError: nothing there, or a checkpoint of another model type.
    """
    try:
        adapter = _find_file(name_or_path, "adapter_config.json", revision)
        if adapter is not None:
            return Path(adapter)
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except NotLookedAtError:
        raise
    except (OSError, ValueError) as error:
        what = "is not a checkpoint folder"
        if not Path(name_or_path).exists():
            what = "could not be fetched from the hub" + (f" at --revision {revision}" if revision else "")
        raise UserError(
            f"--model_name_or_path {name_or_path} {what} ({' '.join(str(error).split())[:200]}); "
            "give a local checkpoint folder, or try `make demo`, which needs no network"
        ) from error
    if not isinstance(config, Phi3VConfig):
        raise UserError(
            f'--model_name_or_path {name_or_path} is a "{config.model_type}" model; this recipe trains "phi3_v" '
            "(microsoft/Phi-3.5-vision-instruct, microsoft/Phi-3-vision-128k-instruct and their fine-tunes)"
        )
    return None


def load_processor(options: argparse.Namespace) -> Phi3VProcessor:
    """The checkpoint's processor, cutting pictures into at most `--num_crops` sub-images.

    An adapter's is its base's. Its own folder need not hold one, and without a `config.json` beside
    them transformers reads the very same tokenizer files as another kind of tokenizer (seen with
    5.23), which leaves out the space after every special token.
    """
    base, revision = checkpoint_of(options.model_name_or_path, options.revision)
    return _read_processor(base, revision, num_crops=options.num_crops)


def _read_processor(name: str, revision: str | None, **changes: Any) -> Phi3VProcessor:
    try:
        return Phi3VProcessor.from_pretrained(name, revision=revision, **changes)
    except Exception as error:  # of files cut off, or of another model, the libraries raise every kind, also Exception
        raise UserError(
            f"{name}: its processor cannot be read ({' '.join(str(error).split())[:200]}); a checkpoint has a "
            "preprocessor_config.json and a tokenizer.json that are whole: fetch them anew"
        ) from error


def checkpoint_of(name_or_path: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """A checkpoint itself, or the one that an adapter stands on, at the revision that it was trained on.

    Returns:
        hub id or folder, and the revision; None is a hub's main branch.
    """
    adapter = find_adapter(str(name_or_path), revision)
    if adapter is None:
        return str(name_or_path), revision
    stored = read_adapter(adapter)
    return stored["base_model_name_or_path"], stored.get("revision")


def read_config(base: str, revision: str | None) -> Phi3VConfig:
    """The configuration of what `checkpoint_of` has found.

    Raises:
        NotLookedAtError: it would have to be fetched, while something is known to be wrong.
    """
    if not Path(base).exists():
        about_to_fetch()
    return Phi3VConfig.from_pretrained(base, revision=revision)


def longest_sequence(options: argparse.Namespace) -> int:
    """The model's limit, in tokens, read before its weights are."""
    return read_config(*checkpoint_of(options.model_name_or_path, options.revision)).max_position_embeddings


def load_model(name_or_path: str | Path, options: argparse.Namespace) -> Phi3VForCausalLM | PeftModel:
    """A checkpoint, or an adapter on the base it names, on this process's device.

    Args:
        name_or_path: hub id or folder.
        options: `precision`, `attention`, `device`, `use_qlora` (the base's weights in NF4), `use_liger`,
            `torch_compile` and `max_crops_per_call` count; of a hub id `revision`.

    Raises:
        UserError: see `find_adapter`; weights that are missing, not expected or cannot be read.
    """
    gc.collect()  # what trained before goes in circles, and two models of real size would not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    use_kernels_for_any_length()
    base, revision = checkpoint_of(name_or_path, options.revision)
    find_adapter(base, revision)  # also the base must be a checkpoint of this model
    # Every process reads the whole checkpoint, also under ZeRO-3: the engine divides the weights when
    # training begins, and evaluation before and after is the same for every method.
    unset_hf_deepspeed_config()
    arguments = {"dtype": options.precision.weights, "attn_implementation": options.attention, "use_safetensors": True}
    arguments["revision"] = revision
    if options.use_qlora:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=options.precision.autocast or options.precision.weights,
        )
        arguments["device_map"] = {"": options.device}
    try:
        model = Phi3VForCausalLM.from_pretrained(base, **arguments)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model_name_or_path {base} cannot be loaded: {one_line(error)}") from error
    model.model.vision_embed_tokens.img_processor.max_crops_per_call = options.max_crops_per_call
    model.fuses_loss = options.use_liger
    if options.use_liger and not options.torch_compile:  # which fuses the same operations itself
        use_liger_kernels(model)
    if options.use_qlora:
        _keep_gradients_after_evaluation(model)
    else:
        model.to(options.device)
    return model if base == str(name_or_path) else _put_adapter_on(model, str(name_or_path), options)


def _put_adapter_on(model: Phi3VForCausalLM, name_or_path: str, options: argparse.Namespace) -> PeftModel:
    """An adapter on its base; PEFT by itself only warns of weights that the adapter's file lacks.

    Raises:
        UserError: weights that are missing, not expected or of another shape, with their names.
    """
    stored = _names_in_adapter(name_or_path, options.revision)
    of_adapter = {"revision": options.revision, "is_trainable": not options.eval_only}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
            adapted = PeftModel.from_pretrained(model, name_or_path, **of_adapter)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--model_name_or_path {name_or_path}: its adapter cannot be loaded: {one_line(error)}"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    not_expected = [name for name in stored - wanted if "lora_" in name]  # PEFT may store the layers adapted, too
    if stored >= wanted and not not_expected:
        return adapted
    found = (("missing from it", wanted - stored), ("not expected", not_expected))
    told = [f"{len(names)} weights {what} ({', '.join(sorted(names)[:3])})" for what, names in found if names]
    raise UserError(f"--model_name_or_path {name_or_path} does not hold the adapter it describes: {'; '.join(told)}")


def _keep_gradients_after_evaluation(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 weights at evaluation on CPUs with AVX512-BF16.

    After the repacking it skips the base weights' part of the gradient in silence (seen with 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def prepare_for_training(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, options: argparse.Namespace
) -> Phi3VForCausalLM | PeftModel:
    """Choose what trains (everything, all but the vision side, or adapters), and how its layers are computed.

    An adapter's first weights depend on the seed alone, whatever an evaluation before has drawn.
    """
    set_seed(options.seed)
    # what `generate` stops at by default, also in the saved generation_config.json
    model.generation_config.eos_token_id = end_token_ids(processor)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if options.use_lora and not isinstance(model, PeftModel):
        model = add_adapters(model, options)
    elif not isinstance(model, PeftModel):
        choose_weights(model, options)
    if options.precision.autocast is not None:
        leave_casting_to_autocast(model)
    recompute_layers(model, options.gradient_checkpointing)
    if options.torch_compile:
        compile_layers(model, options.packs)
    return model


def leave_casting_to_autocast(model: torch.nn.Module) -> None:
    """Keep PEFT from making its float32 weights' dtype of an adapter's input.

    Under autocast the adapter's products take the input in half precision as it comes: made float32 and half again it
    has the same values, but costs two copies, one of them kept for the backward pass.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def choose_weights(model: Phi3VForCausalLM, options: argparse.Namespace) -> None:
    """Keep from training what is frozen, and what no gradient ever reaches."""
    vision = model.model.vision_embed_tokens
    tower = vision.img_processor
    # the layers that are not run; they are saved as they were loaded
    unused = [tower.vision_model.post_layernorm, *tower.vision_model.encoder.layers[tower.num_layers_used :]]
    # The published recipe freezes the whole image embedding, which there shares the token embeddings.
    frozen = [vision, model.model.embed_tokens] if options.freeze_vision_model else unused
    for module in frozen:
        module.requires_grad_(False)


def add_adapters(model: Phi3VForCausalLM, options: argparse.Namespace) -> PeftModel:
    """LoRA on the decoder's linears and `lm_head`, and on the tower and projection unless frozen.

    Raises:
        UserError: when a target matches no module of the model.
    """
    targets = list(DECODER_TARGETS)
    if not options.freeze_vision_model:
        layers = "|".join(str(layer) for layer in range(model.config.num_tower_layers_used))
        layer = VISION + rf"img_processor\.vision_model\.encoder\.layers\.({layers})\."
        targets += [*PROJECTION_TARGETS, *(layer + name for name in TOWER_LINEARS)]
    names = [name for name, _ in model.named_modules()]
    for target in targets:  # PEFT itself passes over a target that matches nothing
        if not any(re.fullmatch(target, name) for name in names):
            raise UserError(f"LoRA target {target} matches no module of the model")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=adapter_alpha(options),
        lora_dropout=options.lora_dropout,
        init_lora_weights="gaussian",
        target_modules="|".join(targets),
        revision=options.revision,  # with which the base is loaded again
    )
    base = Path(options.model_name_or_path)
    if base.exists():  # an adapter must find its base from any working directory
        model.name_or_path = str(base.resolve())
    return get_peft_model(model, config)


def end_token_ids(processor: Phi3VProcessor) -> list[int]:
    """The ids at which generation stops: `<|end|>` and `<|endoftext|>`."""
    return [processor.tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS]
