"""One job from its plan to its files: the only package that knows all others.

Read `run` (the steps of a run, numbered), `prepare` (data), `build` (models, adapters, optimiser), `rehearsal`
(memory runs out here or never), `session` (the steps and what is due between them), `sampling` with `contact_sheet`,
`saving` and `verify`; `closing` has the last lines of the log. `class_images` draws regularisation images;
`watchdog`, `crash_loop`, `status` and `metrics` report on the job and end it where it hangs; `handover` is for
several processes.

Imports every other package of the trainer. Only the commands `trainer.__main__`, `trainer.sample` and `trainer.export`
import it.
"""
