"""RunPod, a service that rents GPUs by the hour: templates, pods and their logs, through its REST API.

Read `api` first: the client, with its retries and the errors it raises. `__main__` is the command line
(`python -m entrypoint.runpod deploy`), which runs on your own machine and starts a job in a pod; `request` makes the
pod's request and refuses a job that the card cannot hold, `download` copies the results. Inside the pod,
`processes.pod` uses the same client to stop the pod when its job has ended.

The serverless worker, `runpod/handler.py` at the repository's root, has a Python of its own. It starts `serverless`,
which becomes the job of a request; `allowed` says what a request may say.

Imports all of the entrypoint but `processes`; `api` alone imports no more than `fetch`.
"""
