"""The shapes of the miniature models: real classes of diffusers and transformers, with small numbers in them."""

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from trainer.families.miniatures.tokens import CLIP_LENGTH

T5_WIDTH = 128
CLIP_L_WIDTH = 64
CLIP_G_WIDTH = 64
QWEN_WIDTH = 64
DEEP_QWEN_WIDTH = 32


def vae(latent_channels: int, *, scaling_factor: float = 1.0, shift_factor: float | None = None) -> AutoencoderKL:
    """An autoencoder that halves the sides three times. 16 channels: as Flux's and SD3's; 4 channels: as SDXL's."""
    wide = latent_channels == 16
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor if wide else None,
        force_upcast=False,
        use_quant_conv=not wide,
        use_post_quant_conv=not wide,
    )


def clip(tokenizer: CLIPTokenizer, *, width: int, layers: int, projected: bool) -> nn.Module:
    """CLIP's text encoder; `projected` adds the linear layer after pooling."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def deep_qwen3(tokenizer: Qwen2Tokenizer, *, layers: int) -> Qwen3Model:
    """Qwen3 as deep as FLUX.2 reads it. It is not trained, as it would cost three times as much as the denoiser.

    With these sizes a state is the token's own at first, and more and more a mixture with what stands before it.
    """
    model = qwen3(tokenizer, width=DEEP_QWEN_WIDTH, layers=layers, spread=0.06)
    nn.init.normal_(model.embed_tokens.weight)
    return model.requires_grad_(False)


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """T5 v1.1's encoder (gated GELU), two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def flux2_vae(vae: AutoencoderKL) -> AutoencoderKLFlux2:
    """FLUX.2's autoencoder with the weights of one of 16 channels. Its statistics are that one's shift and scale."""
    config = vae.config
    own = AutoencoderKLFlux2(
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.sample_size,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    own.bn.running_mean.fill_(config.shift_factor)
    own.bn.running_var.fill_(config.scaling_factor**-2 - own.bn.eps)
    own.load_state_dict(vae.state_dict() | own.bn.state_dict(prefix="bn."))
    return own


def qwen3(tokenizer: Qwen2Tokenizer, *, width: int = QWEN_WIDTH, layers: int = 3, spread: float = 0.02) -> Qwen3Model:
    """Qwen3 with grouped queries. The last layer's output is not used. `spread`: the new weights' deviation."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            initializer_range=spread,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def z_image_transformer() -> ZImageTransformer2DModel:
    """Six blocks, 128 wide, and a refiner for each of image and text."""
    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=128,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=QWEN_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("adaLN_modulation" in name or name == "all_final_layer.2-1.linear"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def flux2_transformer() -> Flux2Transformer2DModel:
    """Two double and four single blocks, 128 wide, without embedded guidance, as in klein."""
    model = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * DEEP_QWEN_WIDTH,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("modulation" in name or name in ("norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
    return model


def flux_transformer() -> FluxTransformer2DModel:
    """Two double and four single blocks, 128 wide, with guidance embedded as in Flux.1-dev."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_L_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    _start_as_identity(model)
    return model


def sd3_transformer() -> SD3Transformer2DModel:
    """Four joint blocks, 112 wide."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=4,
        attention_head_dim=28,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=112,
        pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    _start_as_identity(model)
    return model


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's UNet: no attention at full size, then one and two transformer layers; size and crop are conditions."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
        cross_attention_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + CLIP_G_WIDTH,
    )


def _start_as_identity(model: nn.Module) -> None:
    """Zeroes every modulation and the output layer, so that each block begins as the identity."""
    for name, module in model.named_modules():
        modulation = name.endswith(".linear") and "norm" in name.split(".")[-2]
        if isinstance(module, nn.Linear) and (modulation or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
