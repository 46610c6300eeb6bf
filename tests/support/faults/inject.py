"""Faults for a trainer's process. Each says in a file that it fired: a fault that did not happen proves nothing.

{"kind": a function below, "step": N, "times": how often (1), "fired": the file, ...}. `step` counts optimiser steps.
"""

import errno
import os
import signal
import time

NOW = {"step": 0}


def install(fault):
    from trainer.training import gradients

    before = gradients.Backward.__call__

    def call(self, group, number):
        NOW["step"] = number
        return before(self, group, number)

    gradients.Backward.__call__ = call
    left = [fault.get("times", 1)]

    def due():
        if NOW["step"] < fault.get("step", 0) or not left[0]:
            return False
        left[0] -= 1
        descriptor = os.open(fault["fired"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{fault['kind']} at step {NOW['step']} {time.monotonic():.3f}\n".encode())
        os.close(descriptor)
        return True

    KINDS[fault["kind"]](fault, due)


def _around(module, name, *, before=lambda *a: None, after=lambda result, *a: result):
    whole = getattr(module, name)

    def wrapped(*args, **keywords):
        before(*args)
        return after(whole(*args, **keywords), *args)

    setattr(module, name, wrapped)


def loss(fault, due):
    """Losses are multiplied by `factor`: "nan", "inf", "100"."""
    from trainer.training import objective

    _around(objective, "loss", after=lambda loss_B, *_: loss_B * float(fault["factor"]) if due() else loss_B)


def grad(fault, due):
    import torch

    def spoil(params, *_):
        if due():
            params[0].grad.view(-1)[0] = float(fault["factor"])

    _around(torch.nn.utils, "clip_grad_norm_", before=spoil)


def latents(fault, due):
    from trainer.data import batches

    def spoil(batch, *_):
        if due():
            batch.moments_B2CHW[0] = float("nan")
        return batch

    _around(batches, "micro_batch", after=spoil)


def param(fault, due):
    import torch

    def spoil(params, *_):
        if due():
            with torch.no_grad():
                params[0].view(-1)[0] = float(fault["factor"])

    _around(torch.nn.utils, "clip_grad_norm_", before=spoil)


def oom(fault, due):
    """Whenever more than `fits` pictures are computed at once; or another RuntimeError with "error"."""
    import torch

    from trainer.training import objective

    def refuse(predicted_BCHW, *_):
        if len(predicted_BCHW) > fault.get("fits", 0) and due():
            raise RuntimeError(fault["error"]) if "error" in fault else torch.OutOfMemoryError("made up")

    _around(objective, "loss", before=refuse)


def crash(fault, due):
    from trainer.training import objective

    def fail(*_):
        if due():
            raise RuntimeError("a made-up bug")

    _around(objective, "loss", before=fail)


def sleep(fault, due):
    from trainer.training import objective

    _around(objective, "loss", before=lambda *_: time.sleep(fault["seconds"]) if due() else None)


def hold_lock(fault, due):
    """A call of the C library that does not let go of Python's lock."""
    import ctypes

    from trainer.training import objective

    libc = ctypes.PyDLL(None)
    _around(objective, "loss", before=lambda *_: libc.sleep(600) if due() else None)


def stop_process(fault, due):
    from trainer.training import objective

    _around(objective, "loss", before=lambda *_: os.kill(os.getpid(), signal.SIGSTOP) if due() else None)


def signals(fault, due):
    """The process gets `signals` when the phase `phase` begins, or (without it) at the step."""
    from trainer.job.reporting import status
    from trainer.training import objective

    def send():
        for number in fault["signals"]:
            os.kill(os.getpid(), number)

    if "phase" in fault:
        _around(
            status.Status,
            "phase",
            after=lambda result, _, name: send() if name == fault["phase"] and due() else result,
        )
    else:
        _around(objective, "loss", before=lambda *_: send() if due() else None)


def system(fault, due):
    """From the step on, `call` of os fails with `errno`: the `times` calls after the first `skip`."""
    skip = [fault.get("skip", 0)]

    def fail(*_):
        if NOW["step"] >= fault.get("step", 0):
            skip[0] -= 1
            if skip[0] < 0 and due():
                raise OSError(getattr(errno, fault["errno"]), os.strerror(getattr(errno, fault["errno"])))

    for name in fault["calls"]:
        _around(os, name, before=fail)


def bucket(fault, due):
    """The volume is a bucket behind a mount: no locks, folders that cannot be flushed; with "rename", no renames."""
    import fcntl
    import stat

    def refuse(*_):
        if due():
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def refuse_folder(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()

    _around(fcntl, "flock", before=refuse)
    _around(os, "fsync", before=refuse_folder)
    if fault.get("rename"):
        _around(os, "rename", before=refuse)


def kill_at(fault, due):
    """SIGKILL just before the call number `skip` + 1 that changes files."""
    skip = [fault["skip"]]

    def kill(*_):
        skip[0] -= 1
        if skip[0] < 0 and due():
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        _around(os, name, before=kill)


def slow_sync(fault, due):
    _around(os, "fsync", before=lambda *_: time.sleep(fault["seconds"]) if due() else None)


def buffers(fault, due):
    """Fires whenever memory is taken for the copies of a save."""
    from trainer.checkpoints.snapshots import Snapshots

    allocate = Snapshots._allocate

    def told(self, size, *, pinned):
        due()
        return allocate(self, size, pinned=pinned)

    Snapshots._allocate = told


def clock_backwards(fault, due):
    real = time.time
    due()
    began = real()
    time.time = lambda: began - 10 * (real() - began)


def forget(fault, due):
    """States lack one of their parts when they are read: the comparison with an undisturbed run must then fail."""
    from trainer.training import state

    def without(tree):
        if due():
            tree["optimizer"] = {**tree["optimizer"], "state": {}}

    restore = state.TrainingState.restore

    def restored(self, tree, *, renew=False):
        without(tree)
        restore(self, tree, renew=renew)

    state.TrainingState.restore = restored


KINDS = {
    f.__name__: f
    for f in (
        loss, grad, latents, param, oom, crash, sleep, hold_lock, stop_process, signals, system, bucket, kill_at,
        slow_sync, buffers, clock_backwards, forget,
    )
}  # fmt: skip
