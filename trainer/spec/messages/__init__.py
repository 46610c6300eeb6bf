"""Texts and names that people and other programs read: without secrets.

Read `secrets`: how an address is shown, what secrets look like, and how known ones are found in any text. `usage` says
how to prompt with a finished LoRA; `noise_bands` names the losses by noise level; `trend` says whether one has risen.
"""
