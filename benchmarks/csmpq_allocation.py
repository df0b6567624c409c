"""How long the exact programme takes to choose bits: ResNet-18, and ResNet-101 with its 101 variables.

python -m benchmarks.csmpq_allocation
"""

import statistics
import time

import torch
from torchvision.models import get_model

from modules.quantization.allocation import allocate
from modules.quantization.costs import bops, count_costs, size_mib
from modules.quantization.scores import Equal, Random, linear_values
from modules.quantization.tracing import trace_network

BITS = (4, 5, 6, 7, 8)
ROUNDS = 15


def main() -> None:
    """Print medians and maxima of processor time over random and equal scores."""
    for name in ("resnet18", "resnet101"):
        network = get_model(name, weights=None).eval()
        trace = trace_network(network, torch.randn(2, 3, 64, 64))
        costs = count_costs(trace, "hawq")
        scores = [Equal(), *(Random(seed) for seed in range(ROUNDS - 1))]
        tables = [linear_values(score.sensitivities(network, trace, []), BITS) for score in scores]
        budgets = {"size": {"size_budget": 5 * size_mib(costs, 1)}}
        budgets["size and operations"] = {**budgets["size"], "bops_budget": bops(costs, 5, 8)}
        for told, budget in budgets.items():
            times = []
            for values in tables:
                started = time.process_time()
                allocate(values, trace, costs, BITS, **budget)
                times.append(1000 * (time.process_time() - started))
            print(
                f"{name:10} {len(trace.groups):4} variables, {told:20} "
                f"median {statistics.median(times):8.1f} ms, largest {max(times):8.1f} ms"
            )


if __name__ == "__main__":
    main()
