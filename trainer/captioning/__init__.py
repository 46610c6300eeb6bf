"""Captions for images that have none, by a model that looks at them (CAPTION_WITH), before the text encoders load.

Read in this order. Without torch, so that a check knows the same: `kinds` (what a model's files are, and whether they
are taken), `requests` (which images want a caption, and the key of each caption), `store` (captions on disk), `known`
(a scan with the captions that there are). For the job: `captioning` (all that are missing, in batches), which loads one
of `tagger` (ONNX) or `vision_language` (transformers, with `text_tokens`, `model_inputs` and `fitting`, which chooses
how it fits the memory); `tidy` (the model's text becomes a caption) and `beside` (files beside the images).

Nothing of a model is run: no Python of its repository, no template of its chat, no pattern of its tokenizer.
"""
