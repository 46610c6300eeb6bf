"""What follows from a plan: is it the same run as an earlier one, how long does it train, does it make sense.

Read `resume_rules` (what changed settings mean for a run), `automatic` (steps and saves by the number of images),
`outlook` (what the log says of them), `quote` (how long it takes and what it costs), `cache_size` (of encoded images)
and `sanity` (settings that make no sense together). Apart: `config_rules` (what the configs of models may say, which
the families put together) and `captioners` (which models caption images, and what each can be asked).

Imports the other modules of `trainer.spec`, which do not import it.
"""
