"""Frozen weights in 8 or 4 bits, and the LoRA layers on top of them.

Read `formats` (how each format stores and multiplies), `frozen_linear` (the layer), `lora_linear` (an adapter on it)
and
`cast_adapters` (all adapters cast to 16 bits at once).
"""
