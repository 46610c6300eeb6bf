"""One job from its plan to its files: the only package that knows all others.

Read `run` (the steps of a run, numbered), `prepare` (data), `build` (models, adapters, optimiser), `sizes` (of the
steps, and what they change in the plan), `rehearsal` (memory runs out here or never), `session` (the steps and what is
due between them), `sampling`, `saving` and `verify`. `reporting` has what people see; `class_images` draws
regularisation images; `watchdog` and `crash_loop` end a job that hangs or fails again and again; `handover` is for
several processes, and `several_nodes` for those of several machines. `rolling` is for caches larger than the volume.

Imports every other package of the trainer. Only the commands `trainer.__main__`, `trainer.sample` and `trainer.export`
import it.
"""
