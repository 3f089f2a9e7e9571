"""Values that are made from tensors, and stay right when these change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

_Value = TypeVar("_Value")


class Kept(Generic[_Value]):
    """A value made from tensors, kept until one of them is written to, moved, exchanged, or learned by an optimizer.

    Copies and pickles of it are empty. Tensors made under `torch.inference_mode` do not tell when they are written to:
    whoever writes into such codebooks makes a new quantizer.

    >>> import torch
    >>> table, doubled = torch.ones(2), Kept()
    >>> doubled.get([table], lambda: 2 * table) is doubled.get([table], lambda: 2 * table)
    True
    >>> _ = table.add_(1)
    >>> doubled.get([table], lambda: 2 * table)
    tensor([4., 4.])
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], list[int | None], _Value] | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], _Value]) -> _Value:
        """The value that `make` gives for `sources` as they are now."""
        if any(source.requires_grad for source in sources):  # fused optimizers write without leaving a trace
            self._kept = None
            return make()
        versions = [None if source.is_inference() else source._version for source in sources]
        if self._kept is not None:
            aliases, kept_versions, value = self._kept
            same = all(alias.data_ptr() == s.data_ptr() for alias, s in zip(aliases, sources, strict=True))
            if same and versions == kept_versions:
                return value
        value = make()
        # The aliases keep the memory from being handed out again, to another tensor at the same address.
        self._kept = ([source.detach() for source in sources], versions, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()
