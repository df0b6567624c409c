"""Tables of times that were measured side by side."""

import statistics

from modules.timing import interleaved

__all__ = ["interleaved", "report"]


def report(title: str, seconds: dict[str, list[float]], reference: str) -> str:
    """Markdown table of medians, and of their ratio to the reference.

    Args:
        title: What was measured.
        seconds: As :func:`interleaved` returns them.
        reference: Name of the alternative that the others are divided by.
    """
    base = statistics.median(seconds[reference])
    lines = [
        f"**{title}** ({len(seconds[reference])} rounds)",
        "",
        "| | median ms | / reference |",
        "| --- | --- | --- |",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {1000 * median:.2f} | {median / base:.3f} |")
    return "\n".join(lines) + "\n"
