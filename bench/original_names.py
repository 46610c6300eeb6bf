"""Models under the names of their original implementations, as single files have them.

Written by hand from the shapes and places of tensors, and not from the product's tables, which the tests check with
these. Tensors may be `trainer.base_model.lazy_tensors.LazyTensor`s: nothing here looks at their values.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trainer.spec.family import Facts, base_models, facts_of

OF_VIDEOS = ("qwen_image", "krea2")  # families whose VAE is one of videos


def miniature(name: str) -> Path:
    return Path(base_models()[f"mini-{name.replace('_', '-')}"][1].source)


def facts(name: str) -> Facts:
    """Of a miniature."""
    base = f"mini-{name.replace('_', '-')}"
    return facts_of(base_models()[base][0], base)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


# ---- original names, from diffusers' names


def join(state: dict[str, torch.Tensor], path: str, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The layers `parts` as one layer at `path`, their outputs one after the other."""
    ends = [e for e in ("weight", "bias") if f"{parts[0]}.{e}" in state]
    return {f"{path}.{e}": torch.cat([state[f"{p}.{e}"] for p in parts]) for e in ends}


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """diffusers stores scale before shift in the last modulation; the originals store shift before scale."""
    return torch.cat(tensor.chunk(2)[::-1])


def flux_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As black-forest-labs/flux names and joins them."""
    out: dict[str, torch.Tensor] = {}
    layer_names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for ours, theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        layer_names[f"{theirs}.in_layer"] = f"time_text_embed.{ours}_embedder.linear_1"
        layer_names[f"{theirs}.out_layer"] = f"time_text_embed.{ours}_embedder.linear_2"
    for i in {int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks.")}:
        a, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for branch, q, norm, ff, out_proj, mod in (
            ("img", "to_{}", "norm_{}", "ff", "to_out.0", "norm1"),
            ("txt", "add_{}_proj", "norm_added_{}", "ff_context", "to_add_out", "norm1_context"),
        ):
            out |= join(state, f"{b}.{branch}_attn.qkv", tuple(f"{a}.attn.{q.format(x)}" for x in "qkv"))
            for x, long in (("q", "query"), ("k", "key")):
                out[f"{b}.{branch}_attn.norm.{long}_norm.scale"] = state[f"{a}.attn.{norm.format(x)}.weight"]
            layer_names |= {f"{b}.{branch}_mlp.0": f"{a}.{ff}.net.0.proj", f"{b}.{branch}_mlp.2": f"{a}.{ff}.net.2"}
            layer_names |= {
                f"{b}.{branch}_attn.proj": f"{a}.attn.{out_proj}",
                f"{b}.{branch}_mod.lin": f"{a}.{mod}.linear",
            }
    for i in {int(k.split(".")[1]) for k in state if k.startswith("single_transformer_blocks.")}:
        a, b = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        out |= join(state, f"{b}.linear1", (*(f"{a}.attn.to_{x}" for x in "qkv"), f"{a}.proj_mlp"))
        layer_names |= {f"{b}.linear2": f"{a}.proj_out", f"{b}.modulation.lin": f"{a}.norm.linear"}
        for x, long in (("q", "query"), ("k", "key")):
            out[f"{b}.norm.{long}_norm.scale"] = state[f"{a}.attn.norm_{x}.weight"]
    for theirs, ours in layer_names.items():
        out |= join(state, theirs, (ours,))
    for end in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{end}"] = swap_halves(state[f"norm_out.linear.{end}"])
    return out


def sd3_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As Stability-AI/sd3.5 names and joins them."""
    out = {"pos_embed": state["pos_embed.pos_embed"]}
    last = max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks."))
    layer_names = {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
    }
    for ours, theirs in (("timestep", "t_embedder"), ("text", "y_embedder")):
        layer_names |= {f"{theirs}.mlp.{2 * n - 2}": f"time_text_embed.{ours}_embedder.linear_{n}" for n in (1, 2)}
    for i in range(last + 1):
        a, x, c = f"transformer_blocks.{i}", f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        layer_names |= {f"{x}.attn.proj": f"{a}.attn.to_out.0", f"{x}.adaLN_modulation.1": f"{a}.norm1.linear"}
        layer_names |= {f"{x}.mlp.fc1": f"{a}.ff.net.0.proj", f"{x}.mlp.fc2": f"{a}.ff.net.2"}
        out |= join(state, f"{x}.attn.qkv", tuple(f"{a}.attn.to_{n}" for n in "qkv"))
        out |= join(state, f"{c}.attn.qkv", tuple(f"{a}.attn.add_{n}_proj" for n in "qkv"))
        if f"{a}.attn2.to_q.weight" in state:
            out |= join(state, f"{x}.attn2.qkv", tuple(f"{a}.attn2.to_{n}" for n in "qkv"))
            layer_names[f"{x}.attn2.proj"] = f"{a}.attn2.to_out.0"
        norms = {f"{x}.attn": "attn.norm_", f"{x}.attn2": "attn2.norm_", f"{c}.attn": "attn.norm_added_"}
        for theirs, ours in norms.items():
            for n in "qk":
                if f"{a}.{ours}{n}.weight" in state:
                    out[f"{theirs}.ln_{n}.weight"] = state[f"{a}.{ours}{n}.weight"]
        if i < last:
            layer_names |= {f"{c}.mlp.fc1": f"{a}.ff_context.net.0.proj", f"{c}.mlp.fc2": f"{a}.ff_context.net.2"}
            layer_names[f"{c}.attn.proj"] = f"{a}.attn.to_add_out"
            layer_names[f"{c}.adaLN_modulation.1"] = f"{a}.norm1_context.linear"
        for end in ("weight", "bias"):
            if i == last:
                out[f"{c}.adaLN_modulation.1.{end}"] = swap_halves(state[f"{a}.norm1_context.linear.{end}"])
            out[f"final_layer.adaLN_modulation.1.{end}"] = swap_halves(state[f"norm_out.linear.{end}"])
    for theirs, ours in layer_names.items():
        out |= join(state, theirs, (ours,))
    return out


def z_image_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ComfyUI's files name and join them, which follow Lumina 2."""
    names = {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer.", ".to_out.0.": ".out."}
    names |= {".norm_q.": ".q_norm.", ".norm_k.": ".k_norm."}
    out: dict[str, torch.Tensor] = {}
    for ours, tensor in state.items():
        if ours.endswith(("attention.to_k.weight", "attention.to_v.weight")):
            continue
        if ours.endswith("attention.to_q.weight"):
            block = ours.removesuffix(".to_q.weight")
            out |= join(state, f"{block}.qkv", tuple(f"{block}.to_{x}" for x in "qkv"))
            continue
        theirs = ours
        for before, after in names.items():
            theirs = theirs.replace(before, after)
        out[theirs] = tensor
    return out


def flux2_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As black-forest-labs/flux2 names and joins them."""
    names = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    names |= {"timestep_embedder.linear_1": "time_in.in_layer", "timestep_embedder.linear_2": "time_in.out_layer"}
    names |= {"guidance_embedder.linear_1": "guidance_in.in_layer"}
    names |= {"guidance_embedder.linear_2": "guidance_in.out_layer", "time_guidance_embed.": ""}
    names |= {"modulation_img.linear": "modulation_img.lin", "modulation_txt.linear": "modulation_txt.lin"}
    names |= {"stream_modulation.linear": "stream_modulation.lin"}
    names |= {"single_transformer_blocks": "single_blocks", "transformer_blocks": "double_blocks"}
    names |= {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out.weight": "linear2.weight"}
    names |= {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"}
    names |= {"ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2"}
    names |= {"ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2"}
    for ours, theirs in (("q", "query"), ("k", "key")):
        names[f"attn.norm_added_{ours}.weight"] = f"txt_attn.norm.{theirs}_norm.scale"
        names[f"attn.norm_{ours}.weight"] = f"img_attn.norm.{theirs}_norm.scale"
    out: dict[str, torch.Tensor] = {}
    for ours, tensor in state.items():
        block, _, layer = ours.rpartition(".attn.")
        if layer in ("to_q.weight", "add_q_proj.weight"):
            stream = "img" if layer == "to_q.weight" else "txt"
            parts = tuple(f"{block}.attn.{layer.removesuffix('.weight').replace('q', x)}" for x in "qkv")
            out |= join(state, f"{block.replace('transformer_', 'double_')}.{stream}_attn.qkv", parts)
        elif layer in ("to_k.weight", "to_v.weight", "add_k_proj.weight", "add_v_proj.weight"):
            continue
        elif ours == "norm_out.linear.weight":
            out["final_layer.adaLN_modulation.1.weight"] = swap_halves(tensor)
        else:
            theirs = ours
            for before, after in names.items():
                theirs = theirs.replace(before, after)
            if theirs.startswith("single_blocks"):
                theirs = theirs.replace(".img_attn.norm.", ".norm.")
            out[theirs] = tensor
    return out


def krea2_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As krea-ai/krea-2 names them; a block's six modulations are one vector there."""
    whole = {"img_in.": "first.", "time_embed.linear_1.": "tmlp.0.", "time_embed.linear_2.": "tmlp.2."}
    whole |= {"time_mod_proj.": "tproj.1.", "txt_in.norm.weight": "txtmlp.0.scale", "txt_in.linear_1.": "txtmlp.1."}
    whole |= {"txt_in.linear_2.": "txtmlp.3.", "final_layer.linear.": "last.linear."}
    whole |= {"final_layer.norm.weight": "last.norm.scale", "final_layer.scale_shift_table": "last.modulation.lin"}
    parts = {"transformer_blocks.": "blocks.", "text_fusion.": "txtfusion.", ".norm1.weight": ".prenorm.scale"}
    parts |= {".norm2.weight": ".postnorm.scale", ".scale_shift_table": ".mod.lin", ".ff.": ".mlp."}
    parts |= {".norm_q.weight": ".qknorm.qnorm.scale", ".norm_k.weight": ".qknorm.knorm.scale"}
    parts |= {".to_q.": ".wq.", ".to_k.": ".wk.", ".to_v.": ".wv.", ".to_gate.": ".gate.", ".to_out.0.": ".wo."}
    out = {}
    for ours, tensor in state.items():
        theirs = ours
        for before, after in whole.items():
            if ours.startswith(before):
                theirs = after + ours.removeprefix(before)
        if theirs == ours:
            for before, after in parts.items():
                theirs = theirs.replace(before, after)
        out[theirs] = tensor.flatten() if theirs.endswith(".mod.lin") else tensor
    return out


def wan_vae(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE of videos as Wan-Video/Wan2.1 names it, and as ComfyUI's file of Qwen-Image's VAE does: by places in lists.

    A level of the decoder has three residual blocks, and all but the last an upsampler.
    """
    blocks = (
        (r"(en|de)coder\.mid_block\.resnets\.(\d)", lambda m: f"{m[1]}coder.middle.{2 * int(m[2])}"),
        (r"(en|de)coder\.mid_block\.attentions\.0", lambda m: f"{m[1]}coder.middle.1"),
        (r"encoder\.down_blocks\.(\d+)", lambda m: f"encoder.downsamples.{m[1]}"),
        (r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}"),
        (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}"),
    )
    layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    layers["conv_shortcut"] = "shortcut"
    ends = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
    out = {}
    for ours, tensor in state.items():
        theirs = ours
        for pattern, place in blocks:
            theirs, found = re.subn(rf"^{pattern}", place, theirs)
            if found:
                break
        path, _, kind = theirs.rpartition(".")
        above, _, layer = path.rpartition(".")
        if theirs != ours and layer in layers:
            path = f"{above}.{layers[layer]}"
        elif layer in ends:
            path = f"{above}.{ends[layer]}"
        path = {"quant_conv": "conv1", "post_quant_conv": "conv2"}.get(path, path)
        out[f"{path}.{kind}"] = tensor
    return out


def sdxl_original(state: dict[str, torch.Tensor], *, per_level: int) -> dict[str, torch.Tensor]:
    """As Stability-AI/generative-models names them, by their place in a list; `per_level` resnets to a level."""
    down, up = per_level + 1, per_level + 1
    first = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    first |= {f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)}
    first |= {f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)}
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inside |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}

    def name(ours: str) -> str:
        for a, b in first.items():
            if ours.startswith(f"{a}."):
                return ours.replace(a, b, 1)
        level, what, i, rest = re.fullmatch(
            r"(\w+_blocks?(?:\.\d+)?)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", ours
        ).groups()
        side, _, depth = level.partition(".")
        number, at = int(depth or 0), int(i)
        if side == "mid_block":
            place = f"middle_block.{1 if what == 'attentions' else 2 * at}"
        elif side == "down_blocks":
            sampler = what == "downsamplers"
            place = f"input_blocks.{down * number + (down if sampler else at + 1)}.{int(what == 'attentions')}"
            rest = rest.replace("conv.", "op.") if sampler else rest
        else:
            sampler = what == "upsamplers"
            has_attention = any(k.startswith(f"{level}.attentions") for k in state)
            column = (1 + has_attention) if sampler else int(what == "attentions")
            place = f"output_blocks.{up * number + (per_level if sampler else at)}.{column}"
        layer, end = rest.rsplit(".", 1)
        return f"{place}.{inside[layer] if what == 'resnets' else layer}.{end}"

    return {name(k): v for k, v in state.items()}


def vae_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As CompVis/latent-diffusion names them: levels of the decoder counted from below, attention by convolutions."""
    levels = max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks."))
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    out = {}
    for ours, tensor in state.items():
        name = ours.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "bn.running_mean" in state:  # FLUX.2's
            name = re.sub("^quant_conv", "encoder.quant_conv", name)
            name = re.sub("^post_quant_conv", "decoder.post_quant_conv", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - int(m[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - int(m[1])}.upsample", name)
        if "mid_block.attentions.0" in name:
            layer, end = name.split("attentions.0.")[1].rsplit(".", 1)
            name = f"{name.split('.')[0]}.mid.attn_1.{attention[layer]}.{end}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        out[name] = tensor
    return out


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As mlfoundations/open_clip names and joins them; the projection is transposed."""
    plain = {k.removeprefix("text_model."): v for k, v in state.items()}
    out = {"text_projection": plain["text_projection.weight"].T.contiguous(), "logit_scale": torch.ones(())}
    out["positional_embedding"] = plain["embeddings.position_embedding.weight"]
    out["token_embedding.weight"] = plain["embeddings.token_embedding.weight"]
    words = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    words["self_attn.out_proj"] = "attn.out_proj"
    for end in ("weight", "bias"):
        out[f"ln_final.{end}"] = plain[f"final_layer_norm.{end}"]
        for i in {int(k.split(".")[2]) for k in plain if k.startswith("encoder.layers.")}:
            a, b = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            out |= {f"{b}.{theirs}.{end}": plain[f"{a}.{ours}.{end}"] for ours, theirs in words.items()}
            out[f"{b}.attn.in_proj_{end}"] = torch.cat([plain[f"{a}.self_attn.{x}_proj.{end}"] for x in "qkv"])
    return out


def hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the files of CLIP have them everywhere: with text_model, and more than is needed."""
    named = {k if k.startswith(("text_model.", "text_proj")) else f"text_model.{k}": v for k, v in state.items()}
    return {**named, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def qwen3_vl(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ComfyUI's file of Qwen3-VL names them, with a part of what reads images where only the language model is."""
    named = {f"model.{name.removeprefix('language_model.')}": tensor for name, tensor in state.items()}
    return {"model.visual.deepstack_merger_list.0.norm.weight": torch.ones(8), **named}


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{k}": v.contiguous() for k, v in state.items()}


def denoiser(name: str, state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A denoiser's tensors under their original names. `config`: of diffusers' model."""
    if name == "sdxl":
        return sdxl_original(state, per_level=config["layers_per_block"])
    if name == "qwen_image":
        return dict(state)
    originals = {"flux": flux_original, "flux2": flux2_original, "sd3": sd3_original, "z_image": z_image_original}
    originals |= {"flux2_dev": flux2_original, "krea2": krea2_original}
    return originals[name](state)


def whole_file(name: str, parts: dict[str, dict[str, torch.Tensor]], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A whole model in one file: each part (a key of `trainer.spec.family.PREFIXES`) from diffusers' names."""
    vae = wan_vae if name in OF_VIDEOS else vae_original
    found = {"denoiser": denoiser(name, parts["denoiser"], config), "vae": vae(parts["vae"])}
    if "clip_l" in parts:
        found["clip_l"] = hugging_face(parts["clip_l"])
    if "qwen3" in parts:
        found["qwen3"] = under("model.", parts["qwen3"])
    if "mistral3" in parts:
        found["mistral3"] = under("model.", parts["mistral3"])
    if "qwen2_5_vl" in parts:
        found["qwen2_5_vl"] = parts["qwen2_5_vl"]
    if "qwen3_vl" in parts:
        found["qwen3_vl"] = qwen3_vl(parts["qwen3_vl"])
    if "clip_g" in parts:
        found["clip_g"] = open_clip(parts["clip_g"]) if name == "sdxl" else hugging_face(parts["clip_g"])
    if "t5" in parts:
        found["t5"] = parts["t5"]
    prefixes = {
        "denoiser": "model.diffusion_model.",
        "vae": "vae." if name in ("flux", "flux2", "flux2_dev", "z_image", *OF_VIDEOS) else "first_stage_model.",
        "clip_l": "conditioner.embedders.0.transformer." if name == "sdxl" else "text_encoders.clip_l.transformer.",
        "clip_g": "conditioner.embedders.1.model." if name == "sdxl" else "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
        "qwen3": "text_encoders.qwen3_4b.transformer.",
        "qwen2_5_vl": "text_encoders.qwen25_7b.transformer.",
        "qwen3_vl": "text_encoders.qwen3vl_4b.transformer.",
        "mistral3": "text_encoders.mistral3_24b.transformer.",
    }
    return {k: v for part, state in found.items() for k, v in under(prefixes[part], state).items()}


def config_of(name: str) -> dict[str, Any]:
    """Of a miniature's denoiser."""
    return dict(json.loads((miniature(name) / facts(name).parts["denoiser"] / "config.json").read_text()))


def original(name: str) -> dict[str, torch.Tensor]:
    """The denoiser of a miniature under its original names."""
    return denoiser(name, weights(miniature(name) / facts(name).parts["denoiser"]), config_of(name))


def checkpoint(name: str, *, t5: bool = True) -> dict[str, torch.Tensor]:
    """A miniature in one file."""
    places = {part: place for part, place in facts(name).parts.items() if t5 or part != "t5"}
    return whole_file(name, {part: weights(miniature(name) / place) for part, place in places.items()}, config_of(name))


def flux_files(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """The four files that users of Flux have, and the variables that name them."""
    own = miniature("flux")
    parts = {
        "MODEL_PATH": ("flux_dev.safetensors", {k: v.to(dtype) for k, v in original("flux").items()}),
        "VAE_PATH": ("ae.safetensors", vae_original(weights(own / "vae"))),
        "CLIP_L_PATH": ("clip_l.safetensors", hugging_face(weights(own / "text_encoder"))),
        "T5_PATH": ("t5xxl_fp16.safetensors", weights(own / "text_encoder_2")),
    }
    for name, state in parts.values():
        save_file(under("", state), folder / name)
    return {variable: str(folder / name) for variable, (name, _) in parts.items()}


def z_image_files(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """The three files that users of Z-Image have, and the variables that name them."""
    own = miniature("z_image")
    parts = {
        "MODEL_PATH": ("z_image_bf16.safetensors", {k: v.to(dtype) for k, v in original("z_image").items()}),
        "VAE_PATH": ("ae.safetensors", vae_original(weights(own / "vae"))),
        "TEXT_ENCODER_PATH": ("qwen_3_4b.safetensors", under("model.", weights(own / "text_encoder"))),
    }
    for name, state in parts.values():
        save_file(under("", state), folder / name)
    return {variable: str(folder / name) for variable, (name, _) in parts.items()}


def flux2_files(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """The three files that users of FLUX.2 klein have, and the variables that name them."""
    own = miniature("flux2")
    parts = {
        "MODEL_PATH": (
            "flux-2-klein-base-4b.safetensors",
            {k: v.to(dtype) for k, v in original("flux2").items()},
        ),
        "VAE_PATH": ("flux2-vae.safetensors", vae_original(weights(own / "vae"))),
        "TEXT_ENCODER_PATH": ("qwen_3_4b.safetensors", under("model.", weights(own / "text_encoder"))),
    }
    for name, state in parts.values():
        save_file(under("", state), folder / name)
    return {variable: str(folder / name) for variable, (name, _) in parts.items()}


def flux2_dev_files(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """The three files that users of FLUX.2 dev have: of the text encoder, the layers that are read and a vocabulary."""
    own = miniature("flux2_dev")
    read = {}
    for name, tensor in weights(own / "text_encoder").items():
        if not name.startswith(("layers.30.", "norm.")):
            read[name] = tensor
    parts = {
        "MODEL_PATH": ("flux2_dev.safetensors", {k: v.to(dtype) for k, v in original("flux2_dev").items()}),
        "VAE_PATH": ("flux2-vae.safetensors", vae_original(weights(own / "vae"))),
        "TEXT_ENCODER_PATH": (
            "mistral_3_small_flux2_bf16.safetensors",
            under("model.", read) | {"tekken_model": torch.zeros(100, dtype=torch.uint8)},
        ),
    }
    for name, state in parts.values():
        save_file(under("", state), folder / name)
    return {variable: str(folder / name) for variable, (name, _) in parts.items()}


def qwen_image_files(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """The three files that users of Qwen-Image have, and the variables that name them."""
    own = miniature("qwen_image")
    parts = {
        "MODEL_PATH": ("qwen_image_bf16.safetensors", {k: v.to(dtype) for k, v in original("qwen_image").items()}),
        "VAE_PATH": ("qwen_image_vae.safetensors", wan_vae(weights(own / "vae"))),
        "TEXT_ENCODER_PATH": ("qwen_2.5_vl_7b.safetensors", weights(own / "text_encoder")),
    }
    for name, state in parts.values():
        save_file(under("", state), folder / name)
    return {variable: str(folder / name) for variable, (name, _) in parts.items()}


def krea2_files(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """The three files that users of Krea 2 have, and the variables that name them."""
    own = miniature("krea2")
    parts = {
        "MODEL_PATH": ("krea2_raw_bf16.safetensors", {k: v.to(dtype) for k, v in original("krea2").items()}),
        "VAE_PATH": ("qwen_image_vae.safetensors", wan_vae(weights(own / "vae"))),
        "TEXT_ENCODER_PATH": ("qwen3vl_4b_bf16.safetensors", qwen3_vl(weights(own / "text_encoder"))),
    }
    for name, state in parts.values():
        save_file(under("", state), folder / name)
    return {variable: str(folder / name) for variable, (name, _) in parts.items()}
