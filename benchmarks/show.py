"""Formats a result as lines for the terminal."""

from typing import Any

from benchmarks.engines import OURS, WIDE

UNITS = {
    "tokens_per_second": ("tokens/s", 1.0),
    "disk_bytes_per_second": ("GB/s from the disk", 1e9),
    "bytes_per_second": ("GB/s", 1e9),
    "anonymous_bytes": ("MB", 1e6),
    "bytes": ("MB to read", 1e6),
    "flops": ("GFLOP to compute", 1e9),
}
WORDS = {
    "tokens_per_second": "rate",
    "bytes_per_second": "rate",
    "load_seconds": "time",
    "anonymous_bytes": "anonymous memory",
    "user_seconds": "a user alone",
    "interval_seconds": "a user comes each",
}


def number(value: float) -> str:
    """Formats a number with three significant digits, or as a whole number from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def quantity(figure: str, *values: float) -> str:
    """Formats values of a figure with their unit: "3 tokens/s", or "3 to 4 tokens/s"."""
    unit, scale = next((unit for name, unit in UNITS.items() if figure.endswith(name)), ("s", 1.0))
    return f"{' to '.join(number(value / scale) for value in values)} {unit}"


def words(figure: str) -> str:
    """Returns a figure's label, such as "first token median" for first_token_median_seconds."""
    return WORDS.get(figure) or figure.removesuffix("_seconds").replace("_", " ")


def share(result: dict[str, Any], engine: str, figure: str) -> float | None:
    """Returns the share of the roofline that an engine reached, or None if the figure has no roofline."""
    if not figure.endswith("_per_second") or not result["roofline"].get(figure) or engine == WIDE:
        return None  # WIDE has other weights than the roofline
    return result["summary"][engine][figure]["median"] / result["roofline"][figure]


def lines(result: dict[str, Any]) -> list[str]:
    """Returns the machine, the roofline, and each figure with its range, share of the roofline and ratio."""
    measured, names = result["measured"], [name for name in result["summary"] if not name.startswith("ratio")]
    options = ", ".join(f"{key} {result[key]}" for key in ("batch", "prompt", "tokens", "users") if key in result)
    roof = ", ".join(
        f"{words(name)} {quantity(name, value)}" if name.endswith("_seconds") else quantity(name, value)
        for name, value in result["roofline"].items()
        if value
    )
    out = [
        f"{result['benchmark']}: {result['model']}, {result['dtype']}{', ' + options if options else ''}",
        f"  machine: reads {measured['bandwidth'] / 1e9:.1f} GB/s, multiplies {measured['float32'] / 1e9:.0f} GFLOP/s "
        f"in float32, {measured['bfloat16'] / 1e9:.0f} in bfloat16",
        f"  roofline: {roof}",
    ]
    if check := result.get("check"):
        logits = ""
        if "largest_difference" in check:
            logits = f"logits differ by up to {check['largest_difference']:.2g}, "
            logits += f"the largest is {check['largest_logit']:.3g}; "
        out.append(f"  check: {logits}{check['greedy_tokens']} greedy tokens agree")
    for figure in result["summary"][OURS]:
        out.append(f"  {words(figure)}")
        for name in names:
            if figure not in result["summary"][name]:
                continue
            spread = result["summary"][name][figure]
            value_range = quantity(figure, spread["min"], spread["max"])
            fraction = share(result, name, figure)
            of_roofline = "" if fraction is None else f", {fraction:.0%} of the roofline"
            out.append(f"    {name:<13}{quantity(figure, spread['median'])} ({value_range}){of_roofline}")
        for name in (name for name in result["summary"] if name.startswith("ratio")):
            if ratio := result["summary"][name].get(figure):
                out.append(f"    {name:<13} {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    return out
