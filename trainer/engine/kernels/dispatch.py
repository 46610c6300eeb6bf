"""Which kernels run: Triton's where Triton is installed, else their references in plain torch.

The only place that decides it. `self_test` compares what is chosen here with the references on the job's own device.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton"):
    from trainer.engine.kernels.norm_gelu_triton import gelu_gradient, gelu_rows, norm_gradient, norm_rows
    from trainer.engine.kernels.quantize_triton import (
        append_adapter_columns,
        can_dequantize,
        dequantize_rows,
        gated_residual,
        quantize_rows,
        transpose,
    )
    from trainer.engine.kernels.rope_triton import rotate, rotate_gradient
else:
    from trainer.engine.kernels.reference import (
        append_adapter_columns,
        can_dequantize,
        dequantize_rows,
        gated_residual,
        gelu_gradient,
        gelu_rows,
        norm_gradient,
        norm_rows,
        quantize_rows,
        transpose,
    )
    from trainer.engine.kernels.rope_reference import rotate, rotate_gradient

__all__ = (
    "append_adapter_columns",
    "can_dequantize",
    "dequantize_rows",
    "gated_residual",
    "gelu_gradient",
    "gelu_rows",
    "norm_gradient",
    "norm_rows",
    "quantize_rows",
    "rotate",
    "rotate_gradient",
    "transpose",
)
