"""The commands of dbrx-convert: to-orbax, to-hf, verify, inspect and seal."""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dbrx_jax.cli.arguments import Given, Program
from dbrx_jax.console import one_line, print_status, progress
from dbrx_jax.errors import CheckpointError, TokenizerError

Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
Destination = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
Conversion = Callable[[Callable[[int], None]], dict[str, int]]  # takes a function that advances the progress
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class ToOrbax:
    """Convert a Hugging Face folder of safetensors to an Orbax checkpoint.

    Run it again to resume a killed conversion.
    """

    source: Source
    """Folder with config.json and *.safetensors, in any published layout; or a URL such as gs://bucket/folder."""
    destination: Destination
    """Folder or URL to make; it can be loaded when it is complete."""
    dtype: Given[Dtype] = None
    """Cast the weights, or with --quantization the scales; unchanged by default."""
    compress: bool = False
    """Compress with zstd: slower, and trained weights hardly get smaller."""
    quantization: Given[str] = None
    """Quantise to int8, int4 (experts in groups of 128, the rest int8; also int4-64 and int4-32), fp8, or parts such as
    experts=int4-64,attention=int8,head=int8."""
    workers: Given[int] = None
    """Threads; by default as many as CPUs, at most 4."""

    def run(self) -> None:
        from dbrx_convert.to_orbax import to_orbax

        def convert(advance: Callable[[int], None]) -> dict[str, int]:
            options = (self.dtype, self.compress, self.workers, advance, self.quantization)
            return to_orbax(self.source, self.destination, *options)

        _convert(self.source, self.destination, convert, self.quantization)


@dataclasses.dataclass(frozen=True)
class ToHf:
    """Convert a checkpoint to a Hugging Face folder in the published layout.

    Run it again to resume a killed conversion.
    """

    source: Source
    """Orbax folder made by dbrx-convert, or Hugging Face folder in any published layout."""
    destination: Destination
    """Folder or URL to make; it can be loaded when it is complete."""
    dtype: Given[Dtype] = None
    """Cast the weights; unchanged by default, and quantised ones are dequantised to the dtype of their scales."""
    max_shard_size: str = "5GB"
    """Maximum size of a file, such as 5GB or 500MB."""
    workers: Given[int] = None
    """Threads; by default as many as CPUs, at most 4."""

    def run(self) -> None:
        from dbrx_convert.to_hf import to_hf

        size = _parse_size(self.max_shard_size)

        def convert(advance: Callable[[int], None]) -> dict[str, int]:
            return to_hf(self.source, self.destination, self.dtype, size, self.workers, advance)

        _convert(self.source, self.destination, convert)


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare two checkpoints of either kind, or an Orbax folder with its digests.

    Compares weights, configuration, tokenizer, template and generation settings.

    Exits with 1 if they differ.
    """

    first: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
    """Orbax or Hugging Face folder."""
    second: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="B", help_behavior_hint="")] = None
    """Orbax or Hugging Face folder; without it A is checked against the SHA-256 digests in its manifest."""
    verbose: bool = False
    """List every parameter that differs."""
    logits: bool = False
    """Compare the models' predictions on --text, in float32, instead of their weights."""
    text: Given[Path] = None
    """A text file, for --logits."""
    json: bool = False
    """Print JSON, with every difference."""

    def run(self) -> None:
        if self.logits:
            self._logits()
        elif self.second is None:
            self._digests()
        else:
            self._compare(self.second)

    def _compare(self, second: str) -> None:
        from dbrx_convert.compare_settings import compare_settings
        from dbrx_convert.verify import compare, summarise
        from dbrx_jax.checkpoint.open import open_folder

        a, b = open_folder(self.first), open_folder(second)
        settings = list(compare_settings(a, b))
        with progress("Comparing", a.size) as advance:
            parameters = list(compare(a, b, advance))
        if self.json:
            print(json.dumps([dataclasses.asdict(d) for d in settings + parameters], indent=2))
        else:
            for difference in settings + (parameters if self.verbose else []):
                print(f"{difference.name}: {difference.kind}: {difference.detail}")
            print(summarise(a, settings, parameters))
        sys.exit(1 if settings or parameters else 0)

    def _digests(self) -> None:
        from dbrx_convert.verify import check_digests
        from dbrx_jax.checkpoint.open import open_folder

        folder = open_folder(self.first)
        with progress("Reading", folder.size) as advance:
            wrong = check_digests(folder, advance)
        if self.json:
            print(json.dumps(wrong))
        else:
            for chunk in wrong:
                print(f"{chunk}: not what was written")
            print(f"{len(wrong)} chunks are not what was written" if wrong else "every chunk is what was written")
        sys.exit(1 if wrong else 0)

    def _logits(self) -> None:
        from dbrx_convert.verify import compare_logits
        from dbrx_jax.text.tokenizer import DbrxTokenizer

        if self.text is None or self.second is None:
            raise CheckpointError("verify --logits: give two checkpoints and --text FILE")
        try:
            ids = DbrxTokenizer.from_pretrained(self.first).encode(self.text.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{self.text}: cannot be read ({error})") from None
        if not ids:
            raise CheckpointError(f"{self.text}: holds no text")
        agreement = dataclasses.asdict(compare_logits(self.first, self.second, ids))
        if self.json:
            print(json.dumps(agreement, indent=2))
        else:
            for key, value in agreement.items():
                print(f"{key:<8} {value:.6g}")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Describe a checkpoint and its problems; exit 1 if it has any."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """Orbax or Hugging Face folder."""
    values: bool = False
    """Also read every weight and count those that are not finite."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from dbrx_convert.inspect import inspect

        facts = inspect(self.path, self.values)
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            for key, value in facts.items():
                if key == "bytes_by_part":
                    for part, size in value.items():
                        print(f"  {part:<18}{size:,} bytes")
                    continue
                for line in value if key == "problems" else [value]:
                    text = f"{value:,}" if isinstance(value, int) else one_line(line)
                    if isinstance(line, list):
                        text = ", ".join(map(str, line))
                    print(f"{'problem' if key == 'problems' else key:<18}{text}")
        sys.exit(1 if facts["problems"] else 0)


@dataclasses.dataclass(frozen=True)
class Seal:
    """Accept changes of an Orbax folder: record config.json and the arrays as they are now in its manifest.

    Loading refuses a folder that is not what its manifest records. Also adds digests to folders of older versions.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """Orbax folder, whose config.json fits its arrays."""
    arrays: bool = False
    """Accept changed bytes of arrays too; reads all of them."""

    def run(self) -> None:
        from dbrx_convert.seal import seal
        from dbrx_jax.checkpoint.orbax import OrbaxFolder

        with progress("Reading", OrbaxFolder.open(self.path, check_manifest=False).size) as advance:
            changed = seal(self.path, self.arrays, advance)
        for name in changed:
            print(f"{name}: recorded as it is now")
        print_status(f"{self.path}: sealed; {len(changed)} records have changed")


def _convert(source: str, destination: str, convert: Conversion, quantize: str | None = None) -> None:
    """Runs a conversion with its progress; prints sizes, speed and warnings."""
    from dbrx_jax.checkpoint.open import open_folder
    from dbrx_jax.files import location

    folder = open_folder(source)
    size = folder.size
    print_status(f"{source}: DBRX of {folder.config.total_parameters:,} parameters, {folder.description}")
    if folder.quantization is not None:
        print_status(f"{source}: its weights are dequantised")
    begin = time.perf_counter()
    with progress("Converting", size) as advance:
        bad = convert(advance)
    seconds, gigabytes = time.perf_counter() - begin, size / 1e9
    for name, count in bad.items():
        advice = "look at where the source comes from"
        print_status(f"dbrx-convert: warning: {name}: {count} values are not finite; {advice}")
    print_status(f"{destination}: converted {gigabytes:.3g} GB in {seconds:.1f} s ({gigabytes / seconds:.2g} GB/s)")
    if quantize is not None:
        files = location(destination).rglob("*")
        num_bytes = sum(file.stat().st_size for file in files if file.is_file())
        print_status(f"{destination}: its weights are {quantize}, and take {num_bytes / 1e9:.3g} GB")


def _parse_size(text: str) -> int:
    """Returns the bytes of a size such as 5GB."""
    match = re.fullmatch(r"(\d{1,9})\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise CheckpointError(f"--max-shard-size: expected a size such as 5GB or 500MB, got {text!r}")
    return int(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")


PROGRAM = Program(
    "dbrx-convert",
    "Convert checkpoints of DBRX.",
    {"to-orbax": ToOrbax, "to-hf": ToHf, "verify": Verify, "inspect": Inspect, "seal": Seal},
    {
        "to-orbax": ("/path/to/dbrx /path/to/dbrx-orbax", "/path/to/dbrx /path/to/dbrx-int4 --quantization int4"),
        "to-hf": ("/path/to/dbrx-orbax /path/to/dbrx-hf --max-shard-size 2GB",),
        "verify": ("/path/to/dbrx /path/to/dbrx-orbax", "/path/to/dbrx-orbax"),
        "inspect": ("/path/to/dbrx --values",),
        "seal": ("/path/to/dbrx-orbax",),
    },
)
