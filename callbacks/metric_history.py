"""How a family of metrics, one per class say, went over the epochs: all lines in one picture."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.media import Media

COLOURS = "tab10"
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = (".", "x", "^", "s", "+", "d", "v")
LEGEND_ROWS = 25


class MetricHistory(Callback):
    """Draws all metrics of one prefix against the epoch, as ``history/<prefix>`` on the dashboard and on disk.

    The values are kept in the checkpoint, so that the picture of a resumed run shows all of it. A checkpoint that is
    written within an epoch, as after a validation, holds the values of the epochs before.

    Args:
        prefixes: of the metrics ``<prefix>/<name>`` that a module logs once per epoch.
        every_n_epochs: draw after the first of every n epochs and after the last one.

    Raises:
        ValueError: without a prefix, or for an interval below 1.

    Example::

        Trainer(callbacks=[MetricHistory(prefixes=["variance"], every_n_epochs=5)])
    """

    def __init__(self, prefixes: list[str], every_n_epochs: int = 1) -> None:
        if not prefixes:
            raise ValueError("MetricHistory: prefixes is empty, expected names such as variance")
        if every_n_epochs < 1:
            raise ValueError(f"MetricHistory: every_n_epochs is {every_n_epochs}, expected 1 or more")
        self.prefixes, self.every_n_epochs = list(prefixes), every_n_epochs
        self._values: dict[str, dict[str, list[list[float]]]] = {}
        self._seen: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the values of the epoch before: what a module logs at its end comes after the callbacks' turn there."""
        epoch = trainer.current_epoch - 1
        self._note(trainer, epoch)
        if epoch >= 0 and epoch % self.every_n_epochs == 0:
            self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the values of the last epoch, and draw."""
        self._note(trainer, trainer.current_epoch - 1)
        self._show(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the values of an epoch that has ended but for its checkpoint."""
        progress = trainer.fit_loop.epoch_progress.current
        if progress.processed > progress.completed:
            self._note(trainer, trainer.current_epoch)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The values so far: prefix -> name -> pairs of epoch and value."""
        return {"values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the values of an interrupted run."""
        self._values = state_dict["values"]

    def _note(self, trainer: Trainer, epoch: int) -> None:
        """Add what has been logged since the last time; what has not is still there, as the very same tensor."""
        logged = dict(trainer.callback_metrics)
        for prefix in self.prefixes:
            lines = self._values.setdefault(prefix, {})
            for name, value in logged.items():
                if name.startswith(f"{prefix}/") and value is not self._seen.get(name):
                    line = lines.setdefault(name.removeprefix(f"{prefix}/"), [])
                    if not line or line[-1][0] < epoch:
                        line.append([epoch, float(value)])
        self._seen = logged

    def _show(self, trainer: Trainer) -> None:
        media = Media(trainer)
        for prefix, lines in self._values.items():
            if lines and media.active:
                _draw(media, prefix, lines)


def _draw(media: Media, prefix: str, lines: dict[str, list[list[float]]]) -> None:
    from matplotlib.figure import Figure

    columns = -(-len(lines) // LEGEND_ROWS)
    figure = Figure(figsize=(6 + columns, 4), layout="constrained")
    axis = figure.subplots()
    for place, (name, line) in enumerate(lines.items()):
        epochs, values = zip(*line, strict=True)
        axis.plot(epochs, values, label=name, **_look(place))
    axis.set_xlabel("epoch")
    axis.set_ylabel(prefix, parse_math=False)
    axis.set_title(prefix, parse_math=False)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns)
    media.figure(f"history/{prefix}", figure)
    media.table(f"history/{prefix}_values", ["name", "epoch", "value"], _rows(lines))


def _look(place: int) -> dict[str, Any]:
    """Colour, then style of the line, then marker: another one for each of 280 lines."""
    from matplotlib import color_sequences

    colours = color_sequences[COLOURS]
    style, marker = place // len(colours), place // (len(colours) * len(LINE_STYLES))
    return {
        "color": colours[place % len(colours)],
        "linestyle": LINE_STYLES[style % len(LINE_STYLES)],
        "marker": MARKERS[marker % len(MARKERS)],
        "markersize": 4,
    }


def _rows(lines: dict[str, list[list[float]]]) -> Sequence[Sequence[Any]]:
    return [[name, int(epoch), value] for name, line in lines.items() for epoch, value in line]
