"""The monitor page: a small web server of its own process, beside a job or on the folder that one has left.

It reads the output folder and nothing else, through the readers of `trainer.storage`, and only while somebody looks.
Training never waits for it, and whatever becomes of it, the job goes on and ends as it would.

Read `numbers` and `log_tail` (files that grow), `sample_list`, `dataset` and `documents` (the other files of a run, as
JSON), `live` (what has changed), `access` (who may look), `files` (downloads), `stream` (live events), `app` (the
addresses), `actions` (what may be asked of the job), `server` (the socket and its connections), `__main__` (the
process) and `beside` (what the entrypoint sees of it, and where the page is). `page/` is the page itself: HTML, CSS
and JavaScript as the browser gets them, without a build.
"""
