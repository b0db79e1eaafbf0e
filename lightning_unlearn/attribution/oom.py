"""Batches that do not fit into memory are taken in parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

# True where every rank must take as many passes as the others.
_whole: ContextVar[bool] = ContextVar("_whole", default=False)

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: on a GPU (CUDA, ROCm, XPU), on Apple's (MPS), or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def slice_batch(x: Any, rows: slice | Tensor, total: int) -> Any:
    """Return some rows of a batch.

    Args:
        x: a tensor whose first dimension counts the samples, a list of a number or string for each sample, or a tuple,
            list or dict of such; single numbers and strings, None and tensors without dimensions belong to all samples
            and stay as they are.
        rows: which, a slice or (b,) int64.
        total: B, the number of samples.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(x, Tensor) and x.ndim > 0 and x.size(0) == total:
        return _take_rows_of_tensor(x, rows)
    if isinstance(x, (list, tuple)):
        return _take_rows_of_sequence(x, rows, total)
    if isinstance(x, dict):
        return {name: slice_batch(value, rows, total) for name, value in x.items()}
    if x is None or isinstance(x, (int, float, str)) or (isinstance(x, Tensor) and x.ndim == 0):
        return x
    found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise ValueError(f"Expected tensors with {total} rows, or a tuple, list or dict of them, but got {found}.")


def _take_rows_of_tensor(x: Tensor, rows: slice | Tensor) -> Tensor:
    if x.layout == torch.strided and not x.is_nested:
        return x[rows if isinstance(rows, slice) else rows.to(x.device)]
    index = torch.arange(x.size(0))[rows]
    if x.is_nested:
        parts = x.unbind()
        return torch.nested.as_nested_tensor([parts[row] for row in index.tolist()], layout=x.layout)
    return x.index_select(0, index.to(x.device))


def _take_rows_of_sequence(x: Any, rows: slice | Tensor, total: int) -> Any:
    if len(x) == total and all(isinstance(value, (int, float, str)) for value in x):
        return x[rows] if isinstance(rows, slice) else type(x)(x[row] for row in rows.tolist())
    if len(x) == total and isinstance(x, list):
        raise ValueError(f"Expected tensors with {total} rows, but got a list of as many, perhaps one for each sample.")
    parts = [slice_batch(value, rows, total) for value in x]
    return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)


@contextmanager
def no_batch_splitting() -> Iterator[None]:
    """Split no batch inside the context: running out of memory is an error there."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


class OOMBatchSplitter:
    """Calls a function on a batch, in parts where memory does not suffice for the whole of it.

    When memory runs out the rows are halved until they fit; the size that fits is kept for the batches that follow.

    Attributes:
        rows: the most rows that are tried at a time; None as long as memory has sufficed for every batch.

    Example:
        >>> def mean(x, label):
        ...     if len(x) > 2:
        ...         raise torch.OutOfMemoryError("out of memory")
        ...     return x.mean().item()
        >>> in_parts = OOMBatchSplitter()
        >>> in_parts(mean, torch.arange(6.0), torch.zeros(6))
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        >>> in_parts.rows
        1
    """

    def __init__(self) -> None:
        self.rows: int | None = None

    def __call__(self, function: Callable[[Any, Tensor], Result], x: Any, label: Tensor) -> list[Result]:
        """Return what the function returns for each part, in the order of the rows.

        Args:
            function: of a part of ``x`` and the same part of ``label``; its result must not depend on the other rows.
            x: see :func:`slice_batch`; anything at all where memory suffices.
            label: (B,), or anything with B rows.
        """
        results: list[Result] = []
        start, total = 0, len(label)
        while start < total:
            size = min(self.rows or total, total - start)
            # A batch that fits is handed over as it is, whatever it is made of.
            part = x if size == total else slice_batch(x, slice(start, start + size), total)
            try:
                results.append(function(part, label[start : start + size]))
            except Exception as error:
                if not is_out_of_memory(error) or size == 1 or _whole.get():
                    raise
                _refuse_to_split(x, total, error)
                self.rows = size // 2
            else:
                start += size
                continue
            # Here and not above: the error held the frames, and they what filled the memory.
            _free()
        return results


def _refuse_to_split(x: Any, total: int, error: Exception) -> None:
    """Let the error pass, with a reason, where smaller batches cannot be made."""
    try:
        slice_batch(x, slice(0, 1), total)
    except ValueError as reason:
        error.args = (f"{error}\nSmaller batches cannot be made of this one: {reason}",)
        raise error from reason


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
