"""Attention: a fix for torch's cuDNN backward pass, and FlashAttention 4 in place of torch's flash kernel."""
