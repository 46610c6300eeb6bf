"""The processes of a job: the trainers, the uploader, and the supervisor that ends a pod.

Read `launch`, `upload` (as the entrypoint sees it), `uploader` (the process itself), `store` (buckets), `side_process`
(of messages and trackers, how they are told and ended), `supervise`, `pod`, `places` (what ends elsewhere than on
RunPod) and `farewell` (the last line of a job that could not say it).

Imports everything below it in the entrypoint.
"""
