"""The processes of a job: the trainers, the uploader, and the supervisor that ends a pod.

Read `launch`, `upload` (as the entrypoint sees it), `uploader` (the process itself), `supervise`, `pod` and `farewell`.

Imports everything below it in the entrypoint.
"""
