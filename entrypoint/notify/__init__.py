"""WEBHOOK_URL: a process beside the job tells addresses when it starts, samples, saves and ends.

It reads the files of the run, so training never waits for it, and whatever becomes of it, the job goes on and ends as
it would. Read `events` (what is told, and how a run's files say it), `messages` (the form for each kind of address),
`delivery` (the queue, which survives a restart, and its threads), `__main__` (the process) and `beside` (what the
entrypoint sees of it).
"""
