"""LoRA files of every tool: read, convert and write them.

Read `weights` (a LoRA independent of key names), `key_names` (the layer that a key names), `contents` (the tensors of
a file by layer, all checked: the planner and the tools refuse the same files with the same words), `other_kinds` (files
that are no LoRA, or of another model), `numbers` (values without torch), `inspect` (what a job that starts from a file
takes from it), `blocks` (which blocks a file and a published model have), `precision` (16 bits that lose nothing),
`convert` (files ↔ weights), `peft_bridge` (weights ↔ the adapters that train), `metadata` and `write`.
`arguments` has what the two commands share. Imports `trainer.spec` and `trainer.storage`. `key_names`, `contents`,
`other_kinds`, `numbers`, `inspect` and `blocks` need no torch, and the entrypoint uses them.

The formats. A LoRA adds scale * up @ down to a weight, with scale = alpha / r. Four spellings are written
(`convert.KEY_FORMATS`), and the tools read them so (docs/lora-files.md has the versions tested):

    format    keys of one module                                                      read by
    kohya     lora_unet_<original path, _ for .>.lora_down.weight, .lora_up.weight,   ComfyUI, Forge, sd-scripts;
              .alpha                                                                  diffusers (Flux, SDXL)
    comfyui   diffusion_model.<original path>.lora_down.weight, .lora_up.weight,      ComfyUI, Forge
              .alpha
    native    diffusion_model.<original path>.lora_A.weight, .lora_B.weight           ComfyUI; diffusers (the families
                                                                                      whose jobs write it)
    peft      <component>.<diffusers' path>.lora_A.weight, .lora_B.weight             diffusers; ComfyUI (Flux, SD3);
                                                                                      Forge (Flux)

    text encoders: lora_te1_text_model_… (CLIP-L) and lora_te2_… (CLIP-G) with the first two formats,
    text_encoder.text_model.… and text_encoder_2.… with the third. ComfyUI skips keys without `text_model`.

Original paths are those of the model's first implementation. It has one layer where diffusers has several: q, k and v
everywhere but in SDXL, and Flux's linear1 (q, k, v and the MLP's input). `convert` splits and stacks them.

Alpha. kohya's and ComfyUI's keys carry it: sd-scripts refuses Flux and SD3 files without; diffusers applies one alpha
to all attention layers of an SDXL file. So a file has the same alpha everywhere, and modules with another scale have
the difference multiplied into lora_up. PEFT's keys have none: ComfyUI and Forge ignore the alpha that PEFT keeps in the
header, so the whole scale is multiplied into lora_B, and alpha = r. So it is in native files.

DoRA adds a magnitude for each row: `.dora_scale`, (out, 1), with the first three formats, and `.lora_magnitude_vector`,
(out,), with the last. A job that trains DoRA writes kohya's keys for ComfyUI and Forge, and PEFT's for diffusers.

Also read: PEFT's `.lora_A.default.weight` and `base_model.model.`, diffusers before PEFT
(`.processor.to_q_lora.down.weight`, `.lora_linear_layer.down.weight`), OneTrainer's `lora_transformer_` and its OMI
names (`img_attn.qkv.0`), XLabs' Flux processors (`double_blocks.0.processor.qkv_lora1.down.weight`), LyCORIS'
`lycoris_`, LoCon with and without `lora_mid`, and names without a prefix. `key_names.ENDINGS` and `STYLES` list them
all, `other_kinds` what is refused.
"""
