"""Several machines that train one LoRA: which one this is, what they must agree on, and how they end together.

Each machine (node) runs one entrypoint, which starts its own trainers. The entrypoints hold one TCP connection each to
that of the first node. Through it they compare their plans before anything starts, the first hands over what it has
prepared, and a failure or a stop on one node becomes the end of all. Gradients go another way: between the trainers
(trainer/training/distributed.py).

Read `cluster` (the variables of clusters), `terms` (what must be the same), `group` (one node's view of all), then
`meeting` (how they find each other), `wire` (messages) and `interfaces`.
"""
