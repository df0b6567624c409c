"""Speed of EMO beside the same network written the straightforward way, and beside its peers in timm.

    python -m benchmarks.emo [--models emo_1m emo_5m] [--rounds 15] [--compile]
    python -m benchmarks.emo --peers [--rounds 5] [--out peers.md]

needs `pip install '.[benchmark]'`. Everything runs on one thread in fp32 and is told in seconds of that
processor. The reference has the weights of our network and must give its outputs before anything is timed.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from time import process_time

import timm
import torch
from einops import rearrange
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import modules.emo  # registers EMO in timm
from benchmarks.timing import interleaved, report
from modules.emo import ARCHITECTURES

SIZE = 224
WINDOW = 7
TOLERANCE = 1e-5
TARGETS = {"emo_1m": {"eval": 1.2, "folded": 1.35, "compiled": 1.8}, "emo_5m": {"eval": 1.2, "folded": 1.25}}
TRAINING_TARGET = 1.2

PEERS = (
    "mobilenetv4_conv_small",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilevit_xxs",
    "mobilevit_xs",
    "mobilevit_s",
    "mobilevitv2_050",
    "mobilevitv2_100",
    "edgenext_xx_small",
    "edgenext_x_small",
    "edgenext_small",
    "efficientvit_b0",
    "efficientvit_b1",
    "efficientformerv2_s0",
    "fastvit_t8",
    "repvit_m0_9",
    "tiny_vit_5m_224",
)
REPARAMETERIZED = ("fastvit_t8", "repvit_m0_9")


class PermutedLayerNorm(nn.Module):
    """LayerNorm over channels by way of a copy to (B, H, W, C) and one back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        x = rearrange(x, "b c h w -> b h w c").contiguous()
        return rearrange(self.norm(x), "b h w c -> b c h w").contiguous()


class ConvBNAct(nn.Module):
    """Convolution, BatchNorm, activation."""

    def __init__(self, conv: nn.Conv2d, norm: bool = False, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=1e-6) if norm else nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H', W')."""
        return self.act(self.norm(self.conv(x)))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce, self.conv_expand = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.conv_expand(nn.functional.silu(self.conv_reduce(mean))))


class ReferenceBlock(nn.Module):
    """The block as its equations read: windows as a batch, softmax written out."""

    def __init__(self, dim: int, out_dim: int, inner: int, kernel: int, stride: int, head_dim: int, late: bool) -> None:
        super().__init__()
        self.heads, self.skip = (dim // head_dim if head_dim else 0), stride == 1
        self.scale = head_dim**-0.5 if head_dim else 1.0
        self.norm = PermutedLayerNorm(dim) if late else nn.BatchNorm2d(dim, eps=1e-6)
        if self.heads:
            self.qk = ConvBNAct(nn.Conv2d(dim, 2 * dim, 1))
        self.v = ConvBNAct(nn.Conv2d(dim, inner, 1), act=nn.GELU() if late else nn.SiLU())
        depthwise = nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False)
        self.conv_local = ConvBNAct(depthwise, norm=True, act=nn.SiLU())
        self.proj = ConvBNAct(nn.Conv2d(inner, out_dim, 1, bias=False))

    def attend(self, x: Tensor) -> Tensor:
        """Normalised input (B, C, H, W) to expanded (B, M, H, W)."""
        height, width = x.shape[-2:]
        n1, n2 = -(-height // WINDOW), -(-width // WINDOW)
        x = nn.functional.pad(x, (0, n2 * WINDOW - width, 0, n1 * WINDOW - height))
        x = rearrange(x, "b c (h1 n1) (w1 n2) -> (b n1 n2) c h1 w1", n1=n1, n2=n2).contiguous()
        qk = rearrange(self.qk(x), "b (qk heads d) h w -> qk b heads (h w) d", qk=2, heads=self.heads).contiguous()
        weights = (qk[0] @ qk[1].transpose(-2, -1) * self.scale).softmax(dim=-1)
        values = rearrange(x, "b (heads d) h w -> b heads (h w) d", heads=self.heads).contiguous()
        out = rearrange(weights @ values, "b heads (h w) d -> b (heads d) h w", h=WINDOW, w=WINDOW).contiguous()
        out = self.v(out)
        out = rearrange(out, "(b n1 n2) c h1 w1 -> b c (h1 n1) (w1 n2)", n1=n1, n2=n2).contiguous()
        return out[:, :, :height, :width] if (height % WINDOW or width % WINDOW) else out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H', W')."""
        shortcut, x = x, self.norm(x)
        x = self.attend(x) if self.heads else self.v(x)
        x = x + self.conv_local(x) if self.skip else self.conv_local(x)
        x = self.proj(x)
        return shortcut + x if self.skip else x


class ReferenceStem(nn.Module):
    """Convolution and BatchNorm; the names are those of the released networks."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24, eps=1e-6))])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 24, H/2, W/2)."""
        return self.convs[0](x)


class ReferenceStemBlock(nn.Module):
    """The block of the stem: no norm, no expansion, no residual, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_local = ConvBNAct(nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), norm=True, act=nn.SiLU())
        self.se = Gate(24)
        self.proj = ConvBNAct(nn.Conv2d(24, 24, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 24, H, W) to the same shape."""
        return self.proj(self.se(self.conv_local(x)))


class ReferenceEMO(nn.Module):
    """EMO written the straightforward way.

    Args:
        name: a size in ``modules.emo.ARCHITECTURES``.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        sizes = ARCHITECTURES[name]
        self.stage0 = nn.Sequential(ReferenceStem(), ReferenceStemBlock())
        width = 24
        for index, depth in enumerate(sizes["depths"]):
            dim, expansion, head_dim = sizes["dims"][index], sizes["expansions"][index], sizes["head_dims"][index]
            kernel, late = (3, 3, 5, 5)[index], index > 1
            blocks = [ReferenceBlock(width, dim, int(width * 2 * expansion), kernel, 2, 0, late)]
            blocks += [
                ReferenceBlock(dim, dim, int(dim * expansion), kernel, 1, head_dim, late) for _ in range(depth - 1)
            ]
            self.add_module(f"stage{index + 1}", nn.Sequential(*blocks))
            width = dim
        self.norm = PermutedLayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, 1000)."""
        for index in range(5):
            x = getattr(self, f"stage{index}")(x)
        return self.head(self.norm(x).mean((2, 3)))


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The reference and our network with equal weights and settled batch statistics, in evaluation."""
    torch.manual_seed(0)
    ours, reference = timm.create_model(name, drop_path_rate=0.0), ReferenceEMO(name)
    with torch.no_grad():
        ours.train()(torch.randn(4, 3, SIZE, SIZE))
    reference.load_state_dict(ours.state_dict())
    return reference.eval(), ours.eval()


def require_equal(name: str, found: Tensor, expected: Tensor) -> None:
    """Stop unless two outputs agree to 1e-5 of their range."""
    difference = ((found - expected).abs().max() / (expected.max() - expected.min())).item()
    if not difference <= TOLERANCE:
        raise SystemExit(f"{name}: outputs differ by {difference:.1e} of their range; a timing would mean nothing")


def evaluation(network: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A forward pass for inference."""

    @torch.inference_mode()
    def run() -> Tensor:
        return network(images)

    return run


def training(network: nn.Module, images: Tensor, channels: int = 1000) -> Callable[[], None]:
    """A forward and a backward pass of cross-entropy."""
    network = copy.deepcopy(network).train()
    labels = torch.arange(len(images)) % channels

    def run() -> None:
        network.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()

    return run


def against_reference(name: str, batch: int, rounds: int, compiled: bool) -> None:
    """Print the tables of one size, with the speed-ups and what was aimed at."""
    reference, ours = twins(name)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    fused = ours.fuse()
    alternatives = {"reference": reference, "eval": ours, "folded": fused}
    if compiled:
        alternatives["compiled"] = torch.compile(fused, fullgraph=True)
    calls = {key: evaluation(network, images) for key, network in alternatives.items()}
    for key, call in calls.items():
        require_equal(f"{name}, {key}", call(), calls["reference"]())
    show(f"{name}, inference, batch {batch}", interleaved(calls, rounds, clock=process_time), TARGETS.get(name, {}))
    steps = {"reference": training(reference, images), "training step": training(ours, images)}
    show(
        f"{name}, training step, batch {batch}",
        interleaved(steps, rounds, 1, process_time),
        {"training step": TRAINING_TARGET},
    )


def show(title: str, seconds: dict[str, list[float]], targets: dict[str, float]) -> None:
    """Print a table, and the speed-up of each alternative over the reference."""
    print(report(title, seconds, "reference"))
    base = statistics.median(seconds["reference"])
    for key, values in seconds.items():
        if key != "reference":
            aim = f" (aim {targets[key]})" if key in targets else ""
            print(f"{key}: x{base / statistics.median(values):.2f}{aim}", flush=True)
    print(flush=True)


def multiply_accumulates(network: nn.Module) -> float:
    """Millions of multiply-accumulates at 224 px, as fvcore counts them; attention by SDPA is written out for it."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(network, torch.randn(1, 3, SIZE, SIZE))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total() / 1e6


def peer(name: str, rounds: int) -> str:
    """A row of the table of peers."""
    torch.manual_seed(0)
    trained = timm.create_model(name)
    parameters = sum(parameter.numel() for parameter in trained.parameters()) / 1e6
    network = copy.deepcopy(trained).eval()
    if name in REPARAMETERIZED:
        network = reparameterize_model(network)
        parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    counted = ReferenceEMO(name).eval() if name in ARCHITECTURES else network
    millions = multiply_accumulates(counted)
    one, eight = torch.randn(1, 3, SIZE, SIZE), torch.randn(8, 3, SIZE, SIZE)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {
        "one": evaluation(network, one),
        "eight": evaluation(network, eight),
        "last": evaluation(last, eight.contiguous(memory_format=torch.channels_last)),
        "step": training(trained, eight),
    }
    seconds = interleaved(calls, rounds, 1, process_time)
    images = {"one": 1, "eight": 8, "last": 8, "step": 8}
    cells = [f"{1000 * statistics.median(values) / images[key]:.1f}" for key, values in seconds.items()]
    return f"| {name} | {parameters:.2f}M | {millions:.0f}M | {' | '.join(cells)} |"


def against_peers(rounds: int, out: Path | None) -> None:
    """Print the table of peers, and write it if asked to."""
    lines = [
        "| model (224 px) | params | MACs | fwd bs1 ms | fwd bs8 ms/img | fwd bs8 channels_last | fwd+bwd bs8 ms/img |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for name in (*ARCHITECTURES, *PEERS):
        lines.append(peer(name, rounds))
        print(lines[-1], flush=True)
    if out is not None:
        out.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="the table of peers instead")
    parser.add_argument("--models", nargs="+", default=["emo_1m", "emo_5m"], choices=list(modules.emo.ARCHITECTURES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well (a minute to compile)")
    parser.add_argument("--out", type=Path, help="file for the table of peers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*overwriting.*in registry.*")
    if options.peers:
        against_peers(options.rounds, options.out)
        return
    for name in options.models:
        against_reference(name, options.batch_size, options.rounds, options.compile)


if __name__ == "__main__":
    main()
