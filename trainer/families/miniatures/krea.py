"""The miniature of Krea 2: its modules. The autoencoder is the one of videos in `qwen`."""

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

from trainer.families import krea2
from trainer.families.miniatures.qwen import LATENT_CHANNELS, OneFrame

WIDTH = 32  # of the text encoder


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3VLModel:
    """As many layers as are read, with grouped queries, and as good as nothing that reads images.

    It is not trained, as it would cost five times as much as the denoiser: its sizes are those of `models.deep_qwen3`.
    """
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": krea2.TAPS[-1] + 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
        "initializer_range": 0.06,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    images = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH}
    images |= {"patch_size": 2, "num_position_embeddings": 4}
    places = {"deepstack_visual_indexes": [0]}
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=images | places, tie_word_embeddings=True))
    nn.init.normal_(model.language_model.embed_tokens.weight)
    return model.requires_grad_(False)


def transformer() -> Krea2Transformer2DModel:
    """Six blocks, 128 wide, with a quarter as many keys and values as queries, as in the published one."""
    model = Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=320,
        timestep_embed_dim=64,
        text_hidden_dim=WIDTH,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=96,
        axes_dims_rope=(8, 12, 12),
    )
    for layer in (model.time_mod_proj, model.final_layer.linear):  # blocks begin as the identity
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def pipeline(
    vae: OneFrame, qwen: nn.Module, words: PreTrainedTokenizerBase, net: Krea2Transformer2DModel
) -> DiffusionPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15, max_image_seq_len=6400)
    return Krea2Pipeline(scheduler, vae.vae, qwen, words, net)
