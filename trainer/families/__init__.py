"""Model families: a new family is one new module here.

A family module has `FACTS`, `LORA_KEYS` and the functions of `trainer.spec.family.Family`; nothing imports it by name.
`trainer.spec.family.get_family(name)` looks it up by its module's name. Importing a family imports no torch, so that
plans can
be made from its facts in milliseconds; its functions import what they need. `common` holds what several share,
`fused_blocks/` the FP8 forward passes of their blocks, `miniatures/` small models of the real classes for tests.

Imports `trainer.spec` and `trainer.engine`.
"""
