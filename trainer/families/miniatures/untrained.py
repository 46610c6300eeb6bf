"""Write the miniature of FLUX.2 dev, whose weights are random: `python -m trainer.families.miniatures.untrained`.

Jobs run on it in full, and its samples are noise. Its VAE is the one of klein's miniature (links to its files), and its
vocabulary that one's too, with Mistral's marks.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from tokenizers import AddedToken
from torch import nn
from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

from trainer.base_model import light_tokenizer, tokenizer_files
from trainer.base_model.tokenizer_files import TokenTable
from trainer.families import flux2
from trainer.families.miniatures.tokens import compact
from trainer.families.published import common
from trainer.families.published import flux2 as published

WIDTH = 24  # of the text encoder
LENGTH = 320  # tokens of which the template takes up to 200: its words are not in this vocabulary
MARKS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")
# Files that are klein's.
SHARED = ("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json")
# What Mistral's own template makes of a system message and one more.
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def tokenizer(klein: Path) -> PreTrainedTokenizerFast:
    """Mistral's in the real one's order: marks first, then bytes and merges. `klein`: the other's folder."""
    words = tokenizer_files.read(klein / "tokenizer", "Qwen2Tokenizer").vocabulary
    numbers = {mark: number for number, mark in enumerate(MARKS)}
    for word in sorted(words.numbers, key=words.numbers.__getitem__):
        numbers[word] = len(numbers)
    added = {number: {"content": mark, "special": True} for number, mark in enumerate(MARKS)}
    backend = light_tokenizer.tekken(TokenTable(numbers, words.merges, added=added))
    marks = {number: AddedToken(mark, special=True) for number, mark in enumerate(MARKS)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        added_tokens_decoder=marks,
        **tokenizer_files.DEFAULTS[tokenizer_files.TEKKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=LENGTH,
        padding_side="left",
    )


def text_encoder(words: PreTrainedTokenizerFast) -> MistralModel:
    """One layer more than is read, with grouped queries."""
    model = MistralModel(
        MistralConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=flux2.MISTRAL.states[-1] + 1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            sliding_window=None,
            initializer_range=0.06,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    nn.init.normal_(model.embed_tokens.weight)
    return model


def transformer() -> Flux2Transformer2DModel:
    """Two double and three single blocks, 64 wide, with embedded guidance."""
    model = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=published.STATES * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def main() -> None:
    torch.manual_seed(0)
    klein, place = Path(flux2.MINIATURE), Path(flux2.DEV_MINIATURE)
    shutil.rmtree(place, ignore_errors=True)
    words = tokenizer(klein)
    words.save_pretrained(place / "tokenizer")
    text_encoder(words).half().save_pretrained(place / "text_encoder")
    transformer().half().save_pretrained(place / "transformer")
    for name in SHARED:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(f"../../{klein.name}/{name}")
    components = {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "MistralModel",
        "tokenizer": "PreTrainedTokenizerFast",
    }
    index = common.index("Flux2Pipeline", components)
    (place / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    compact(place)


if __name__ == "__main__":
    main()
