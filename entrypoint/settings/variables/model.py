"""The base model: which one, where its files come from, and the access token of the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# ruff: noqa: RUF009 (`row` only makes a dataclasses.field)
from entrypoint.settings.row import Secret, row
from trainer.spec.family import base_models


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model: which one, whose files, and the token that fetches them. None: not set."""

    base_model: str = row("BASE_MODEL", "choice", meaning="the model to train for", choices=base_models)
    model_path: str | None = row(
        "MODEL_PATH",
        "text",
        meaning="folder in diffusers layout, Hub repository, or .safetensors file (path or address), instead of the "
        "base model's own",
    )
    model_config_path: str | None = row(
        "MODEL_CONFIG_PATH",
        "text",
        meaning="folder or Hub repository with all that the file MODEL_PATH lacks (configs, tokenizers, other parts); "
        "or a folder with tokenizers, where all weights are local files",
        if_unset="the base model's own",
    )
    vae_path: str | None = row("VAE_PATH", "text", meaning=".safetensors file or folder of the VAE alone")
    clip_l_path: str | None = row("CLIP_L_PATH", "text", meaning=".safetensors file or folder of CLIP-L alone")
    clip_g_path: str | None = row("CLIP_G_PATH", "text", meaning=".safetensors file or folder of CLIP-G alone")
    t5_path: str | None = row(
        "T5_PATH",
        "text",
        meaning=".safetensors file or folder of T5 alone; none: without it, where the model allows it",
    )
    text_encoder_path: str | None = row(
        "TEXT_ENCODER_PATH",
        "text",
        meaning=".safetensors file or folder of the language model that reads the captions, alone",
    )
    model_revision: str | None = row(
        "MODEL_REVISION", "text", meaning="branch, tag or commit of the model's repository"
    )
    hf_token: Secret | None = row(
        "HF_TOKEN",
        "secret",
        meaning="access token of the Hugging Face Hub; also HUGGING_FACE_HUB_TOKEN, or HF_TOKEN_FILE with a file's "
        "path",
    )
    civitai_token: Secret | None = row(
        "CIVITAI_TOKEN", "key", meaning="key of an account at Civitai, for files that ask for a login"
    )
    download_tokens: dict[str, Secret] = row(
        "DOWNLOAD_TOKENS", "tokens", meaning="tokens of other hosts whose https addresses are named, each for its host"
    )
    hf_home: Path = row("HF_HOME", "path", default="/workspace/hf", meaning="where downloads are kept")
