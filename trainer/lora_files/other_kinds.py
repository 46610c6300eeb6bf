"""Files that are no LoRA of a family, or of a method with other arithmetic: what they are, and what to do. No torch.

A file is known by its keys. What its header declares is only quoted, since tools copy headers from file to file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.lora_files.key_names import split_key

USE_A_LORA = "name a LoRA"


@dataclass(frozen=True)
class Kind:
    """One kind of file. `pattern` is searched in each key; one match decides."""

    pattern: re.Pattern[str]
    what: str  # completes "it is"
    fix: str  # completes "Fix:"


def _kind(pattern: str, what: str, fix: str = USE_A_LORA) -> Kind:
    return Kind(re.compile(pattern), what, fix)


# Methods whose change of a weight is no product of two matrices (LyCORIS, PEFT), and LoRAs with more than matrices.
METHODS = (
    _kind(r"\.hada_(w[12]_[ab]|t[12])$", "a LoHa of LyCORIS, whose update is a product of two LoRAs"),
    _kind(r"\.lokr_(w[12](_[ab])?|t2)$", "a LoKr of LyCORIS, whose update is a Kronecker product"),
    _kind(r"\.(oft_(blocks|diag)|oft_R(\.\w+)?(\.weight)?|boft_\w+)$|\.oft_", "an OFT, which rotates weights"),
    _kind(r"\.on_input$|\.ia3_l(\.|$)", "an (IA)³, which scales activations"),
    _kind(r"\.(a1|a2|b1|b2|bm?1|bm?2)\.weight$", "a GLoRA of LyCORIS"),
    _kind(r"vera_lambda_[bd]", "a VeRA, whose matrices are not in the file"),
    _kind(r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "a LoRA with whole differences of weights or norms besides"),
    _kind(r"\.lora_(B|up)(\.\w+)?\.bias$|\.lora_bias$", "a LoRA that trains biases too (PEFT's lora_bias)"),
    _kind(r"\.lora_embedding_[AB]", "a LoRA with adapters of embeddings"),
    _kind(r"\.(qweight|wscales|smooth_factor)$", "a quantised model or LoRA of Nunchaku"),
    _kind(
        r"^bundle_emb\.",
        "a LoRA of OneTrainer that was trained together with the embeddings in it",
        "save it without bundled embeddings, or drop them: python -m trainer.export FILE --without-embeddings --out "
        "NEW.safetensors",
    ),
)
# Files of other parts of a pipeline.
PARTS = (
    _kind(r"^lora_controlnet$|^(input_hint_block|input_blocks)\.[\d.]+\w*\.(up|down)$", "a ControlNet-LoRA"),
    _kind(r"^lllite_", "a ControlNet-LLLite"),
    _kind(
        r"^control_model\.|controlnet_(blocks|cond|down|mid|x_embedder|single)|input_hint_block|zero_convs|^controlnet\.",
        "a ControlNet",
    ),
    _kind(r"^(ip_adapter|image_proj)\.|ip_adapter_", "an IP-Adapter"),
    _kind(r"motion_modules\.", "a motion module of AnimateDiff"),
    _kind(
        r"^(string_to_param\b.*|emb_params|clip_[lg](_out)?|t5(xxl)?(_out)?|<.*>)$", "an embedding (textual inversion)"
    ),
    _kind(r"^(first_stage_model|vae)\.|^(encoder|decoder)\.(conv_in|conv_out|down|up|mid)", "a VAE"),
)
# Models that no family of ours is. The second is what their layers are called in LoRA files, with _ for dots.
OTHER_MODELS = (
    ("Chroma", r"distilled_guidance_layer"),
    ("HiDream", r"(double|single)_stream_blocks"),
    ("HunyuanVideo", r"double_blocks_\d+_(img|txt)_attn_(qkv_proj|q_proj)|individual_token_refiner|txt_in_c_embedder"),
    ("Lumina", r"(^|_)(layers|noise_refiner|context_refiner)_\d+_(attn_to|norm[12]_linear)|time_caption_embed"),
    ("Wan", r"blocks_\d+_(self|cross)_attn_[qkvo](_|$)|blocks_\d+_ffn_[02]"),
    ("Anima or Cosmos", r"blocks_\d+_(self|cross)_attn_\w+_proj|llm_adapter"),
    ("AuraFlow", r"joint_transformer_blocks|double_layers_\d+"),
    ("PixArt", r"caption_projection|blocks_\d+_cross_attn_kv_linear"),
    ("Stable Cascade or Würstchen", r"lora_prior_unet_|(down|up)_blocks_\d+_\d+_(attention|channelwise)"),
)
OLD_UNET = r"(^|_)(down_blocks_0_attentions|up_blocks_3_attentions|input_blocks_1_1_|output_blocks_(9|10|11)_1)"
# The width of the text that its UNets read → the base.
OLD_UNETS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2"}
TEXT_LAYER = re.compile(r"attn2[._]to_[kv]$")


def describe(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file is, if it is none that can be read, with the fix; completes "it is". `shapes`: of its tensors."""
    for kind in (*METHODS, *PARTS):
        example = next((key for key in shapes if kind.pattern.search(key)), None)
        if example is not None:
            return f"it is {kind.what} ({example}), which Kiln does not read. Fix: {kind.fix}"
    matrices = [key for key in shapes if split_key(key) is not None]
    if shapes and len(matrices) * 2 < len(shapes):
        example = next(key for key in shapes if split_key(key) is None)
        if re.search(r"\.(weight|bias)$", example):
            return (
                f"it holds whole weights ({example}), as a model does, and is no LoRA. "
                "Fix: train on it with MODEL_PATH, or name a LoRA"
            )
    return None


def other_model(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The model that a LoRA is for, if that is a known one without a family here."""
    stems = _stems(shapes)
    flat = [stem.replace(".", "_") for stem in stems]
    for name, pattern in OTHER_MODELS:
        if any(re.search(pattern, stem) for stem in flat):
            return name
    if any(re.search(OLD_UNET, stem) for stem in flat):
        for stem, key in stems.items():
            if TEXT_LAYER.search(stem) and len(shapes[key]) > 1:
                return OLD_UNETS.get(shapes[key][1], "another UNet")
        return "Stable Diffusion 1.5 or 2"
    return None


def _stems(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The layers that a file names → the key of the down matrix."""
    stems = {}
    for key in shapes:
        split = split_key(key)
        if split is not None and split[1] == "down":
            stems[split[0].replace(".processor.", ".")] = key
    return stems


def declared(metadata: Mapping[str, str]) -> str:
    """What the header says about the base, in words that end a sentence; "" if it says nothing."""
    for key in ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name"):
        if metadata.get(key):
            return f" (its header says {key}: {metadata[key][:80]})"
    return ""


def bundled_embeddings(keys: Iterable[str]) -> list[str]:
    """The keys of the embeddings that OneTrainer puts into a LoRA file."""
    return [key for key in keys if key.startswith("bundle_emb.")]
