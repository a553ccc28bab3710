"""What both data paths share: seeds, the order of an epoch, transforms, and pixels to floats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL.Image import Image
from timm.data import create_transform
from torchvision.transforms import v2

from gld_zoo.training.common.errors import DataError

Batch = tuple[torch.Tensor, torch.Tensor]


class TrainBatches(Protocol):
    """The training batches of a run: images `[B, 3, S, S]`, normalised, and labels `[B]`."""

    count: int

    def __len__(self) -> int:
        """Return the steps of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield an epoch's batches from step `start` on, both counted from 0."""


class NumberedBatches(TrainBatches, Protocol):
    """Training batches that know which image is which, by its row in the training split."""

    def rows(self, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield the rows of each batch that `epoch` yields, on the CPU."""

    def of_view(
        self, view: int, rows: torch.Tensor, step: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield rows, `step` at a time, and their images as they are augmented in a view."""


class WithRows:
    """Training batches with the rows of their images, on the CPU, behind them."""

    def __init__(self, batches: NumberedBatches) -> None:
        self.batches = batches
        self.count = batches.count

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield images `[B, 3, S, S]`, labels `[B]` and rows `[B]` of one epoch."""
        rows = self.batches.rows(epoch, start)
        for batch, numbers in zip(self.batches.epoch(epoch, start), rows, strict=True):
            yield *batch, numbers


class EvalBatches(Protocol):
    """A process's share of the images to measure on, in order, none dropped or padded."""

    @property
    def count(self) -> int | None:
        """The images over all processes; None for a stream that does not tell."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]`, normalised, and labels `[B]`."""


class Data(NamedTuple):
    """A run's batches: to train on, to measure on, and those held out, if any, to select by."""

    train: TrainBatches
    test: EvalBatches
    val: EvalBatches | None = None


@dataclass(frozen=True)
class Share:
    """Which examples of a global batch are a process's own: rows rank::world_size."""

    rank: int = 0
    world_size: int = 1

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a global batch."""
        return rows[self.rank :: self.world_size]

    def batch_size(self, batch_size: int) -> int:
        """Return this process's part of a global batch size.

        Raises:
            DataError: If it cannot be shared equally.
        """
        if batch_size % self.world_size:
            raise DataError(
                f"batch_size={batch_size} cannot be shared equally by {self.world_size} processes; "
                "use a multiple"
            )
        return batch_size // self.world_size


def check_fills_a_batch(count: int, batch_size: int) -> None:
    """Refuse fewer training images than one step takes.

    Raises:
        DataError: If there are.
    """
    if count < batch_size:
        raise DataError(
            f"the training split has {count} images, fewer than batch_size={batch_size}; use a "
            "smaller --batch_size, or more images"
        )


def derive_seed(*parts: int) -> int:
    """Hash integers to the 32 bits that torch's CPU generator takes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator that decides an epoch; its first draw is the order of the rows."""
    return torch.Generator().manual_seed(derive_seed(seed, epoch))


@dataclass(frozen=True)
class Transforms:
    """How training images become uint8 tensors `[3, size, size]`.

    Args:
        size: Side in pixels.
        interpolation: As in a timm cfg.
        crop: 'padded' crops at random from the image with a black border, 'resized' a random part
            of it, resized.
        crop_padding: Border in pixels.
        crop_scale: Smallest and largest part of the area.
        flip: Mirror half of the training images.
        augment: 'trivial' or 'rand' for torchvision's TrivialAugmentWide or RandAugment.
        erasing: Share of the images of which RandomErasing takes a rectangle.
        cutout: Side in pixels of a square that is taken out.
        fill: Colour of what is taken out, 0 to 255.
    """

    size: int
    interpolation: str = "bilinear"
    crop: str = "padded"
    crop_padding: int = 4
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    flip: bool = True
    augment: str = "none"
    erasing: float = 0.0
    cutout: int = 0
    fill: tuple[int, ...] = (0, 0, 0)

    def fit(self) -> v2.Compose:
        """Return the transform of images to crop later: by the shorter side, at the centre."""
        return v2.Compose([*self._fit(), v2.PILToTensor()])

    def _fit(self) -> list[Any]:
        return [v2.Resize(self.size, self._mode), v2.CenterCrop(self.size)]

    @property
    def _mode(self) -> v2.InterpolationMode:
        return v2.InterpolationMode(_plain(self.interpolation))

    def training(self) -> v2.Compose:
        """Return the random transform of images to train on."""
        steps: list[Any]
        if self.crop == "resized":
            steps = [v2.RandomResizedCrop(self.size, self.crop_scale, interpolation=self._mode)]
        else:
            steps = [*self._fit(), v2.RandomCrop(self.size, padding=self.crop_padding)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.augment != "none":
            kinds = dict(trivial=v2.TrivialAugmentWide, rand=v2.RandAugment)
            steps.append(kinds[self.augment](interpolation=self._mode))
        steps.append(v2.PILToTensor())
        if self.erasing:
            steps.append(v2.RandomErasing(self.erasing, value=list(self.fill)))
        if self.cutout:
            steps.append(v2.Lambda(self._cut_out, torch.Tensor))
        return v2.Compose(steps)

    def _cut_out(self, image: torch.Tensor) -> torch.Tensor:
        row, column = torch.randint(self.size, (2, 1))
        colour = torch.tensor(self.fill, dtype=torch.uint8)
        pixels = cut_out(image.permute(1, 2, 0)[None], row, column, self.cutout, colour)
        return pixels[0].permute(2, 0, 1)


def cut_out(
    images: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    side: int,
    colour: torch.Tensor,
) -> torch.Tensor:
    """Give a square of each image one colour.

    Args:
        images: Pixels uint8 `[B, S, S, 3]`.
        rows: Line of each square's centre `[B]`; what of it lies outside is lost.
        columns: Column of that centre `[B]`.
        side: Of the squares in pixels.
        colour: Of what is cut out, uint8 `[3]` on the images' device.

    Source: DeVries and Taylor, "Improved Regularization of CNNs with Cutout", 2017.
    """
    place = torch.arange(images.shape[1], device=images.device)
    low, high = -(side // 2), side - side // 2
    inside = [
        (place >= centre[:, None] + low) & (place < centre[:, None] + high)
        for centre in (rows, columns)
    ]
    square = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return torch.where(square, colour, images)


@dataclass(frozen=True)
class Drawing:
    """From what is drawn what: the order of an epoch, and how an image looks in its view.

    Args:
        seed: Of the order, the recipe's.
        image_seed: Of all that is drawn for an image; None takes `seed`.
        views: Epochs after which that repeats; None for never.
    """

    seed: int
    image_seed: int | None = None
    views: int | None = None

    def order(self, epoch: int, count: int) -> torch.Tensor:
        """Return the order of an epoch's rows."""
        return torch.randperm(count, generator=epoch_generator(self.seed, epoch))

    def view(self, epoch: int) -> int:
        """Return the view that an epoch shows."""
        return epoch % self.views if self.views else epoch

    @property
    def of_images(self) -> int:
        """The seed of all that is drawn for an image."""
        return self.seed if self.image_seed is None else self.image_seed


def mirrored_first(seed: int, row: int) -> bool:
    """Tell whether an image that is mirrored every other epoch is so in the first."""
    return bool(derive_seed(seed, -1, row) & 1)


def measuring_transform(config: dict[str, Any], size: int) -> v2.Transform:
    """Return timm's transform of images to measure on: to uint8 `[3, size, size]`.

    A class that comes with the image is handed on.

    Args:
        config: timm's data config.
        size: Side in pixels.
    """
    transform = create_transform(
        size,
        interpolation=_plain(config["interpolation"]),
        mean=config["mean"],  # the border's colour, where there is one
        crop_pct=config["crop_pct"],
        crop_mode=config.get("crop_mode"),
        normalize=False,
    )
    return v2.Lambda(transform, Image)


def _plain(interpolation: str) -> str:
    """Return a timm cfg's interpolation; 'random' is one of several, in training alone."""
    return "bilinear" if interpolation == "random" else interpolation


class Normalize:
    """Map uint8 pixels to normalised floats, channels last in memory.

    Args:
        mean, std: For pixels in 0 to 1.
        device: Where the pixels are.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self.device = device
        self.mean_pixel = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
        self.mean_pixel = self.mean_pixel.to(device)
        self.scale = 1 / (255 * torch.tensor(std, device=device))
        self.shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map `[B, S, S, 3]` to `[B, 3, S, S]`."""
        pixels = pixels.to(self.scale.dtype)
        return torch.addcmul(self.shift, pixels, self.scale).permute(0, 3, 1, 2)
