"""Small random models of the real classes; each call makes a new one."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

from trainer.data.batches import stack_texts
from trainer.spec.family import get_family


def flux_denoiser():
    """The real architecture, two double and two single blocks of width 32, random weights large enough to matter."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False).eval()


def flux_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=16,
        layers_per_block=1,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def flux_scheduler():
    """As Flux.1-dev ships it."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def text():
    torch.manual_seed(2)
    return {"tokens": torch.randn(2, 7, 24), "pooled": torch.randn(2, 20)}


def sd3_denoiser():
    """Three joint blocks of width 32, the first with the second attention of SD3.5-medium; q and k normalised."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False).eval()


def sd3_vae():
    """The same class with the numbers that SD3 ships with."""
    vae = flux_vae()
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    return vae


def sdxl_denoiser():
    """SDXL's UNet: three levels, transformers of one and two blocks in the lower two; size and crop are conditions."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 20,
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.requires_grad_(False).eval()


def sdxl_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.13025,
    ).eval()


def z_image_denoiser():
    """Three blocks of both, and a refiner for each of image and text; 32 wide, with an MLP of 85."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.requires_grad_(False).eval()


def z_image_vae():
    """Flux.1's."""
    return flux_vae()


def z_image_text():
    """Captions of 7 and 40 tokens, as `encode_text` and `stack_texts` make them."""
    torch.manual_seed(2)
    items = []
    for count in (7, 40):
        length = -(-count // 32) * 32
        tokens = torch.zeros(length, 24)
        tokens[:count] = torch.randn(count, 24)
        items.append({"tokens": tokens, "real": torch.arange(length) < count})
    return stack_texts(items)


def flux2_denoiser(*, guidance_embeds=False):
    """Two double and two single blocks of width 32; as klein's, without embedded guidance."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False).eval()


def flux2_dev_denoiser():
    """With embedded guidance, as in dev."""
    return flux2_denoiser(guidance_embeds=True)


def qwen_image_denoiser():
    """Three double blocks of width 32."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False).eval()


def flux2_vae():
    """Every channel of 2 x 2 latents has its own mean and deviation."""
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=16, layers_per_block=1)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.1, 3.0)
    return vae.eval()


def flux2_text():
    torch.manual_seed(2)
    return {"tokens": torch.randn(2, 7, 24)}


def flux2_dev_vae():
    """klein's."""
    return flux2_vae()


def flux2_dev_text():
    return flux2_text()


def qwen_image_vae():
    """With the published means and deviations of the latents' channels."""
    torch.manual_seed(1)
    return AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def qwen_image_text():
    """Captions of 7 and 11 tokens."""
    torch.manual_seed(2)
    return stack_texts([{"tokens": torch.randn(count, 24)} for count in (7, 11)])


def qwen_image_scheduler():
    """As Qwen-Image ships it."""
    config = get_family("qwen_image").FACTS.models["qwen-image"].published.configs["scheduler/scheduler_config.json"]
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def krea2_denoiser():
    """Three blocks of width 32 with four heads, of which one has keys and values; two and one that fuse the text."""
    torch.manual_seed(0)
    model = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=80,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=40,
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False).eval()


def krea2_vae():
    """Qwen-Image's."""
    return qwen_image_vae()


def krea2_text():
    """Captions of 7 and 11 tokens."""
    torch.manual_seed(2)
    return stack_texts([{"tokens": torch.randn(count, 12, 24)} for count in (7, 11)])


def krea2_scheduler():
    """As Krea 2 ships it."""
    config = get_family("krea2").FACTS.models["krea2"].published.configs["scheduler/scheduler_config.json"]
    return FlowMatchEulerDiscreteScheduler.from_config(config)
