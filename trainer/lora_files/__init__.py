"""LoRA files of every tool: kohya, peft (diffusers), ComfyUI, with or without DoRA.

Read `weights` (a LoRA independent of key names), `key_names` (whose keys are whose), `inspect` (what a header reveals),
`convert` (files to weights and back), `peft_bridge` (weights to the model's adapters and back), `metadata` and `write`.
`arguments` has what the two commands share.

Imports `trainer.spec` and `trainer.storage`. `key_names` and `inspect` need no torch: the entrypoint uses them.
"""
