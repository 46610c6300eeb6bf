"""Datasets in WebDataset's layout: tar files (shards) of images with their captions beside them, read where they are.

Nothing is unpacked: an image is some bytes of its shard (`ImageRecord.span`). Read `members` (what a tar holds and
where), then `table` (what a shard gives: samples with captions, and what was found in the images), then `listing`
(all shards of a folder become the images of a subset), then `stream` and
`streamed` (shards that do not all fit the volume).
"""
