"""Which path a call of the sparse gated MLP takes: a seam to `cats_kernels.dispatch`."""

import torch


def path_of(rows: int, dtype: torch.dtype, device: str, backend: str = "auto") -> str:
    """``sparse kernel`` or ``dense masked``."""
    kind = torch.device(device).type
    if backend == "reference":
        return "dense masked"
    if kind == "cuda":
        from cats_kernels.triton_mlp import SPARSE_ROWS

        return "sparse kernel" if rows <= SPARSE_ROWS[dtype.itemsize] else "dense masked"
    from cats_kernels.cpu import DENSE_ROWS

    return "sparse kernel" if rows <= DENSE_ROWS.get(dtype, rows) else "dense masked"
