"""Small random models of the real classes, and whole jobs in this process."""

import dataclasses
from datetime import UTC, datetime

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware


@pytest.fixture
def job_plan(tmp_path, draw):
    """`job_plan(family, **variables)`: the plan of a short job on a miniature, with two pictures, as if fetched."""

    def make(family, **variables):
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        for i, caption in enumerate(("a red circle", "a blue square on a green background")):
            draw(128, 128, seed=i).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(caption)
        asked = {
            "BASE_MODEL": f"mini-{family}", "DATASET_NAME": str(folder), "OUTPUT_PATH": str(tmp_path / "out"),
            "CACHE_PATH": str(tmp_path / "cache"), "OUTPUT_NAME": "x", "BACKEND": "cpu",
            "PARAMS_SAMPLE_EVERY_N_STEPS": "0", "PARAMS_SAVE_EVERY_N_STEPS": "0",
        } | variables  # fmt: skip
        made = make_plan(
            read_settings(asked),
            read_manifest(asked.get("DATASET_CONFIG"), None),
            Hardware("cpu", "x86_64", 8.0, 0, "", 8.0, 2),
            now=datetime(2026, 1, 2, tzinfo=UTC),
        )
        sources = [[dataclasses.replace(s, source=dataclasses.replace(s.source, path=s.source.location))
                    for s in d.subsets] for d in made.data.datasets]  # fmt: skip
        datasets = [dataclasses.replace(d, subsets=tuple(s)) for d, s in zip(made.data.datasets, sources, strict=True)]
        model = dataclasses.replace(made.model, path=made.model.source)
        return dataclasses.replace(made, model=model, data=dataclasses.replace(made.data, datasets=tuple(datasets)))

    return make


@pytest.fixture
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


@pytest.fixture
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


@pytest.fixture
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


@pytest.fixture
def text():
    torch.manual_seed(2)
    return {"tokens": torch.randn(2, 7, 24), "pooled": torch.randn(2, 20)}


@pytest.fixture
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


@pytest.fixture
def sd3_vae(flux_vae):
    """The same class with the numbers that SD3 ships with."""
    flux_vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    return flux_vae


@pytest.fixture
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


@pytest.fixture
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
