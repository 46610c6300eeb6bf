"""The parts of an epoch: `variants` is what an image may look like in it, `epoch` the order of its batches;
`windows` the parts of a dataset that the cache holds one after another, where it cannot hold all.

`trainer.data.epochs` puts them together. Nothing here grows by more than some 30 bytes with each image: a variant or
an example is made when it is asked for, from the seed.
"""
