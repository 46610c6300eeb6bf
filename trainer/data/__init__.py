"""Images and captions become batches.

Read `records` (what describes an image), `folder_listing`, `caption_files`, `decode`, `scan` (which images are usable),
`captions` (what is done to a caption), `buckets`, `epochs` (the order), `identity`, `render`, `cache`, `encode`,
`batches`.

Imports `trainer.spec`, `trainer.storage` and `trainer.engine`.
"""
