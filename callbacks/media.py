"""Pictures, tables and bar charts for whatever logger there is, and always for the disk."""

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from callbacks.atomic_files import atomic_bytes, atomic_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES_PER_ROW = 8
SHEET_WIDTH = 2000  # pixels; one picture may be wider
CELL, GAP, FONT_SIZE = 160, 6, 12  # pixels


class Media:
    """Sends media to the loggers of a trainer and writes them to its folder.

    Everything also lands on the disk, as ``<folder>/<key>/step-<8 digits>.png`` (and ``.csv`` where there are
    numbers), complete or not at all. W&B and TensorBoard loggers get the same under the same key. All ranks may call;
    only rank zero does anything. Nothing is written by a ``fast_dev_run``.

    Args:
        trainer: the trainer, for its loggers, step and rank.
        folder: where files go; by default ``media`` in the trainer's ``default_root_dir``.

    Example::

        class Examples(Callback):
            def on_validation_epoch_end(self, trainer, pl_module):
                Media(trainer).bar("val/recall", ["cat", "dog"], [0.9, 0.7], title="Recall")
    """

    def __init__(self, trainer: Trainer, folder: str | Path | None = None) -> None:
        self.trainer = trainer
        self.folder = Path(folder) if folder is not None else Path(trainer.default_root_dir) / "media"

    @property
    def active(self) -> bool:
        """Whether anything is shown: on rank zero of a real run. Ask before an expensive picture is drawn."""
        return self.trainer.is_global_zero and not self.trainer.fast_dev_run

    def image(self, key: str, image: Tensor | np.ndarray, caption: str = "") -> None:
        """Show one picture.

        Args:
            key: name, with ``/`` between its parts, such as ``val/attention``.
            image: (H, W), (1, H, W) or (3, H, W); floats in [0, 1] (values outside are clipped) or uint8.
            caption: one line of text.
        """
        if not self.active:
            return
        pixels = to_pixels(image)
        self._write_png(key, _encode_pixels(pixels, caption))
        for logger in self._wandb_loggers():
            logger.log_image(key, [pixels], step=self.trainer.global_step, caption=[caption])
        for board in self._boards():
            board.add_image(key, pixels, self.trainer.global_step, dataformats="HWC")

    def images(self, key: str, images: Sequence[tuple[Tensor | np.ndarray, str]]) -> None:
        """Show several pictures, each with its caption: side by side on the disk, one by one in W&B.

        Args:
            key: name, with ``/`` between its parts.
            images: pairs of a picture as in :meth:`image` and its caption.
        """
        if not self.active or not images:
            return
        pixels = [to_pixels(image) for image, _ in images]
        captions = [caption for _, caption in images]
        sheet = contact_sheet(pixels, captions)
        self._write_png(key, _encode_pixels(sheet, ""))
        for logger in self._wandb_loggers():
            logger.log_image(key, pixels, step=self.trainer.global_step, caption=captions)
        for board in self._boards():
            board.add_image(key, sheet, self.trainer.global_step, dataformats="HWC")

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table of plain values.

        Args:
            key: name, with ``/`` between its parts.
            columns: headings.
            rows: one sequence of cells per row, each as long as ``columns``.

        Raises:
            ValueError: if a row has another number of cells.
        """
        for number, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"table {key!r}: row {number} has {len(row)} cells, expected {len(columns)}")
        if not self.active:
            return
        rows = [[_plain(cell) for cell in row] for row in rows]
        self._write_csv(key, columns, rows)
        for logger in self._wandb_loggers():
            logger.log_table(key, columns=list(columns), data=rows, step=self.trainer.global_step)
        for board in self._boards():
            board.add_text(key, _markdown(columns, rows), self.trainer.global_step)

    def bar(self, key: str, labels: Sequence[str], values: Sequence[float], title: str = "") -> None:
        """Show a bar chart.

        Args:
            key: name, with ``/`` between its parts.
            labels: one name per bar.
            values: one height per bar; NaN draws none.
            title: heading.

        Raises:
            ValueError: if there are not as many values as labels.
        """
        if len(labels) != len(values):
            raise ValueError(f"bar {key!r}: {len(values)} values for {len(labels)} labels")
        if not self.active:
            return
        rows = [[str(label), _plain(value)] for label, value in zip(labels, values, strict=True)]
        chart = bar_chart([row[0] for row in rows], [row[1] for row in rows], title)
        self._write_png(key, _encode_figure(chart))
        self._write_csv(key, ["label", "value"], rows)
        for logger in self._wandb_loggers():
            import wandb

            table = wandb.Table(columns=["label", "value"], data=rows)
            chart_of_table = wandb.plot.bar(table, "label", "value", title=title)
            logger.log_metrics({key: chart_of_table}, step=self.trainer.global_step)
        for board in self._boards():
            board.add_figure(key, chart, self.trainer.global_step, close=False)

    def figure(self, key: str, figure: "Figure") -> None:
        """Show a matplotlib figure.

        Args:
            key: name, with ``/`` between its parts.
            figure: best made by ``matplotlib.figure.Figure(...)``, which no global list keeps alive.
        """
        if not self.active:
            return
        encoded = _encode_figure(figure)
        self._write_png(key, encoded)
        for logger in self._wandb_loggers():
            logger.log_image(key, [_decode(encoded)], step=self.trainer.global_step)
        for board in self._boards():
            board.add_figure(key, figure, self.trainer.global_step, close=False)

    def path(self, key: str, suffix: str = ".png") -> Path:
        """File of a key at the present step."""
        return self.folder / key / f"step-{self.trainer.global_step:08d}{suffix}"

    def _write_png(self, key: str, encoded: bytes) -> None:
        atomic_bytes(self.path(key), encoded)

    def _write_csv(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([list(columns), *rows])
        atomic_text(self.path(key, ".csv"), text.getvalue())

    def _wandb_loggers(self) -> Iterator[WandbLogger]:
        return (logger for logger in self.trainer.loggers if isinstance(logger, WandbLogger))

    def _boards(self) -> Iterator[Any]:
        return (logger.experiment for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger))


def to_pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """Turn a picture into what files hold.

    Args:
        image: (H, W), (1, H, W) or (3, H, W); floats in [0, 1] (clipped) or uint8.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: for any other shape.
    """
    values = torch.as_tensor(image).detach().cpu()
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise ValueError(f"a picture has shape {tuple(np.shape(image))}, expected (H, W), (1, H, W) or (3, H, W)")
    if values.dtype != torch.uint8:
        values = (values.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return values.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def contact_sheet(pixels: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Arrange pictures in rows, each above its caption; small ones are enlarged by a whole factor.

    Args:
        pixels: (H, W, 3) uint8 each, sizes may differ.
        captions: one per picture; long ones are wrapped.

    Returns:
        (H, W, 3) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    factors = [max(1, CELL // max(picture.shape[:2])) for picture in pixels]
    pictures = [picture.repeat(f, 0).repeat(f, 1) for picture, f in zip(pixels, factors, strict=True)]
    width, height = (max(CELL, *(picture.shape[axis] for picture in pictures)) for axis in (1, 0))
    font = ImageFont.load_default(size=FONT_SIZE)
    texts = ["\n".join(textwrap.wrap(caption, width * 2 // FONT_SIZE)) for caption in captions]
    line = FONT_SIZE + 4
    height += line * max(text.count("\n") + 1 for text in texts)
    columns = max(1, min(len(pictures), PICTURES_PER_ROW, SHEET_WIDTH // (width + GAP)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(place, columns)
        x, y = GAP + column * (width + GAP), GAP + row * (height + GAP)
        sheet.paste(Image.fromarray(picture), (x, y))
        draw.multiline_text((x, y + picture.shape[0]), text, fill="black", font=font)
    return np.asarray(sheet)


def bar_chart(labels: Sequence[str], values: Sequence[float], title: str = "") -> "Figure":
    """Draw one horizontal bar per label, from the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, max(1.6, 0.28 * len(labels) + 0.9)), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(labels))
    bars = axis.barh(places, values)
    axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    axis.set_yticks(places, labels, fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(title, fontsize=9, parse_math=False)
    return figure


def _encode_pixels(pixels: np.ndarray, caption: str) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    if caption:
        notes.add_itxt("Description", caption)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", pnginfo=notes)
    return buffer.getvalue()


def _encode_figure(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _decode(encoded: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _plain(cell: Any) -> Any:
    if isinstance(cell, Tensor | np.generic):
        return cell.item()
    return cell


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
