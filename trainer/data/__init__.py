"""Images and captions become batches.

The life of one image, which is also the order to read the modules in:

1. `folder_listing` sorts the names in a subset's folder into images, masks and other files. `folders` has what names
   mean: kohya's folders, masks, what a job wrote.
2. `scan` reads and decodes every file once (`decode`), in other processes (`trainer.process.pool`), and takes captions
   from sidecar and metadata files (`caption_files`). `hygiene` says what is odd in how images look. Each image is used,
   with its SHA-256, its upright size and its caption, or skipped for a named reason. `records` has the classes that
   describe it, and `compact` keeps a million of them in little memory; `report` writes all of it for the user.
3. `buckets` chooses the size that the image is trained at. Images of one bucket can share a batch.
4. `epochs` draws the image's variants: up to 8 views (crop, flip, colours) and up to 8 captions (by the pipeline in
   `captions`). `EpochSampler.epoch` picks one of each for every occurrence and groups these into batches (`order`).
5. `encode` fills the `cache`: `render` cuts the pixels of each view, the VAE turns them into latents, and the text
   encoders turn each caption into embeddings. Then the encoders are freed. Of many images the cache is in `packs`.
6. `batches` reads one batch from the cache. The training step adds noise to its latents and computes the loss.

`caption_length` names the captions that are longer than the text encoder reads.

`identity` compares the dataset of a resumed run with the one that it started with.

Caching never switches an augmentation off. A cache of one latent per image would: it cannot hold a new crop or a
shuffled caption for each epoch. So the variants are drawn before training, from the seed and the image's name, and all
of them are encoded. Eight variants cost eight times the encoding, once, and leave the denoiser all of the memory.

The order of training is a pure function of the seed and the epoch: `epoch(n)` seeds a generator of its own with both.
So a position (epoch, batch) is all that a saved state holds of the data, and the processes of several GPUs agree on
the batches without exchanging anything.

Imports `trainer.spec`, `trainer.storage` and `trainer.engine`. Only `cache`, `encode` and `batches` import torch, so
the worker processes of `scan` start fast.
"""
