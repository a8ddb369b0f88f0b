"""The weights of a layer's experts in files: a tensor per expert or one for all, in whole or in parts.

    weight.expert(checkpoint, 3)          expert 3's matrix as the model stores it, without reading another one's
    weight.read(checkpoint)               the parameter, (E, a, b)
    piece.block(matrix, shape)            what of an expert's matrix stands in one tensor of the files

A model holds all experts of a layer in one parameter; files often hold them one by one, gate and up apart, or turned.
`models/expert_weights.py` takes what lies where from transformers' conversion map. A piece is described once, as views
of the expert's matrix: whoever reads copies the tensor of the file into them, whoever writes takes it out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import DataError
from rankwise.files.checkpoint import Checkpoint

PACKED = ("_blocks", "_scales")  # MXFP4: two numbers of four bits in a byte, an exponent for 32 of them


@dataclass(frozen=True)
class Cut:
    """One of several equal parts along an axis."""

    axis: int
    index: int
    count: int

    def of(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.chunk(self.count, self.axis)[self.index]


@dataclass(frozen=True)
class Turned:
    """The transpose. unless_fits: only where the file's shape is another."""

    unless_fits: bool = False

    def of(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix if self.unless_fits and tuple(matrix.shape) == tuple(shape) else matrix.mT


@dataclass(frozen=True)
class Woven:
    """Halves of an axis, entry by entry in turn; inverse: every other entry, the halves."""

    axis: int
    inverse: bool = False

    def of(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        sizes = (-1, 2) if self.inverse else (2, -1)
        parted: Tensor = matrix.unflatten(self.axis, sizes)
        return parted.transpose(self.axis, self.axis + 1)


@dataclass(frozen=True)
class Piece:
    """One tensor of the files: the expert whose block it is, None where it holds one of each along its first axis;
    and the views that lead from the expert's matrix to the block."""

    key: str
    expert: int | None = None
    views: tuple[Cut | Turned | Woven, ...] = ()

    def block(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The view of the matrix that the file holds, flattened to `shape`, that of a block in the file."""
        for view in self.views:
            matrix = view.of(matrix, shape)
        return matrix

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Of one expert's block in the file."""
        return checkpoint.shape(self.key)[self.expert is None :]

    def stored(self, checkpoint: Checkpoint, expert: int) -> Tensor:
        """The block as it is in the file: a view of it."""
        tensor = checkpoint.tensor(self.key)
        return tensor[expert] if self.expert is None else tensor

    def experts(self, number: int) -> Sequence[int]:
        return range(number) if self.expert is None else (self.expert,)


@dataclass(frozen=True)
class ExpertWeight:
    """Location of a parameter of experts: its pieces. `shape`: (E, a, b) as the model stores it. `packed`: in MXFP4,
    whose two keys are the parameter's own with an ending each."""

    name: str
    shape: tuple[int, int, int]
    pieces: tuple[Piece, ...]
    packed: bool = False

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(piece.key for piece in self.pieces))

    def of_expert(self, expert: int) -> Iterator[Piece]:
        yield from (piece for piece in self.pieces if piece.expert in (None, expert))

    def check(self, checkpoint: Checkpoint) -> None:
        """DataError, naming the expert and the tensor, where one is missing or of another shape than the model's."""
        for piece in self.pieces:
            number = checkpoint.shape(piece.key)[0] if piece.expert is None else self.shape[0]
            if number != self.shape[0]:
                raise DataError(
                    f"{checkpoint.path}: {piece.key} holds {number} experts, and the model has {self.shape[0]}"
                )
        if self.packed:
            return
        matrix = torch.empty(self.shape[1:], device="meta")
        for expert in range(self.shape[0]):
            size = 0
            for piece in self.of_expert(expert):
                shape = piece.shape(checkpoint)
                block = piece.block(matrix, shape)
                if block.numel() != torch.Size(shape).numel() or not fits(block, shape):
                    raise DataError(
                        f"{checkpoint.path}: {piece.key} is {tuple(shape)}, which is no part of expert {expert} of "
                        f"{self.name}, {self.shape[1:]}"
                    )
                size += block.numel()
            if size != matrix.numel():
                raise DataError(
                    f"{checkpoint.path}: expert {expert} of {self.name} is missing, or a part of it: the files have "
                    f"{size:,} of its {matrix.numel():,} entries"
                )

    def expert(self, checkpoint: Checkpoint, expert: int) -> Tensor:
        """One expert's matrix (a, b) in the stored type; where no part of it has to be moved, a view of the file."""
        if self.packed:
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            blocks, scales = (checkpoint.tensor(key)[expert : expert + 1] for key in self.keys)
            unpacked: Tensor = convert_moe_packed_tensors(blocks, scales)
            return unpacked[0]
        pieces = list(self.of_expert(expert))
        if len(pieces) == 1 and not pieces[0].views:
            return pieces[0].stored(checkpoint, expert)
        matrix = torch.empty(self.shape[1:], dtype=checkpoint.dtype(pieces[0].key))
        for piece in pieces:
            stored = piece.stored(checkpoint, expert)
            block = piece.block(matrix, stored.shape)
            block.copy_(stored.reshape(block.shape))
        return matrix

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The whole parameter in the stored type."""
        only = self.pieces[0]
        if len(self.pieces) == 1 and only.expert is None and not only.views:
            return checkpoint.tensor(only.key)
        return torch.stack([self.expert(checkpoint, expert) for expert in range(self.shape[0])])

    def prefetch(self, checkpoint: Checkpoint, expert: int) -> None:
        """Prefetch an expert's bytes, where they are tensors of their own."""
        for piece in self.of_expert(expert):
            if piece.expert is not None or expert == 0:
                checkpoint.prefetch(piece.key)


def fits(block: Tensor, shape: Sequence[int]) -> bool:
    """Whether a block, its woven axis flattened, has this shape."""
    sizes = list(block.shape)
    if len(sizes) == len(shape):
        return tuple(sizes) == tuple(shape)
    return any(
        (*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]) == tuple(shape)
        for axis in range(len(sizes) - 1)
    )
