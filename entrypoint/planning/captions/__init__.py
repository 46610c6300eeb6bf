"""The model that captions images which have no caption (CAPTION_WITH), before it runs.

`captioner` resolves the settings, checks the model before a download, and says what it has to do; `caption_time`
predicts how long that takes.
"""
