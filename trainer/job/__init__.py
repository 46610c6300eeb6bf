"""One job from its plan to its files: the only package that knows all others.

Read `run`, `prepare` (data), `build` (model), `session` (steps and what is due between them), `sampling`, `saving` and
`verify`. `watchdog`, `crash_loop`, `status` and `metrics` watch over it; `handover` is for several processes.

Only the commands `trainer.__main__`, `trainer.sample` and `trainer.export` import it.
"""
