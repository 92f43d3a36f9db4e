"""Drawing batches of pictures on the device, from memory maps that still fill."""

from pathlib import Path

import torch
from torch import Generator, Tensor

from train_mini.data import Store
from train_mini.settings import SIZE


class Pool:
    """Pictures of one kind on the device; on a processor, those of the memory map itself.

    Arguments:
        folder: Of the memory maps.
        kind: Which of them.
        device: Where batches are wanted.
    """

    def __init__(self, folder: Path, kind: str, device: torch.device) -> None:
        self.store = Store(folder, kind)
        total = len(self.store.pictures)
        self.copied = device.type != "cpu"
        if self.copied:
            self.pictures = torch.empty((total, SIZE, SIZE, 3), dtype=torch.uint8, device=device)
        else:
            self.pictures = torch.from_numpy(Store(folder, kind, "r+").pictures)  # torch warns of what it cannot write
        self.rows = torch.zeros(total, dtype=torch.int64, device=device)
        self.count = torch.zeros((), device=device)
        self.known: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take in what was drawn since; addresses stay what they are."""
        new = [row for row in self.store.rows().tolist() if row not in self.known]
        if not new:
            return
        first = len(self.known)
        index = torch.tensor(new, device=self.rows.device)
        if self.copied:
            for part in torch.tensor(new).split(1024):
                self.pictures[part.to(index.device)] = torch.from_numpy(self.store.pictures[part.numpy()]).to(
                    index.device
                )
        self.rows[first : first + len(new)] = index
        self.count.fill_(first + len(new))
        self.known.update(new)

    def draw(self, batch: int, generator: Generator) -> Tensor:
        """Draw pictures `(batch, 3, SIZE, SIZE)` in [-1, 1], flipped half of the time."""
        device = self.rows.device
        place = torch.rand(batch, generator=generator, device=device) * self.count
        place = torch.minimum(place, self.count - 1).long()  # the product can round up
        x = self.pictures[self.rows[place]].permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.where(torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.5, x.flip(-1), x)


class Pools:
    """One pool of each kind, and batches with so many pictures of each."""

    def __init__(self, folder: Path, batch: dict[str, int], device: torch.device, generator: Generator) -> None:
        self.pools = {kind: Pool(folder, kind, device) for kind in batch}
        self.batch, self.generator = batch, generator

    def refresh(self) -> None:
        for pool in self.pools.values():
            pool.refresh()

    def draw(self) -> Tensor:
        """Draw a batch `(B, 3, SIZE, SIZE)` in [-1, 1], kind after kind."""
        parts = [self.pools[kind].draw(count, self.generator) for kind, count in self.batch.items()]
        return torch.cat(parts).contiguous(memory_format=torch.channels_last)
