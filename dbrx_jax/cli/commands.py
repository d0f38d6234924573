"""The commands of dbrx-jax."""

import dataclasses
import json

from dbrx_jax.cli.arguments import Program
from dbrx_jax.cli.chat import Chat
from dbrx_jax.cli.generate import Generate
from dbrx_jax.cli.plan import Plan
from dbrx_jax.cli.serve import Serve


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions, devices and memory."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from dbrx_jax.cli.info import collect

        facts = collect()
        if self.json:
            print(json.dumps(facts, indent=2))
            return
        for key, value in facts.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"{key:<10}{line}")


PROGRAM = Program(
    "dbrx-jax",
    "DBRX in JAX.",
    {"generate": Generate, "chat": Chat, "serve": Serve, "plan": Plan, "info": Info},
    {
        "generate": (
            '--prompt "A list is"',
            '/path/to/dbrx --prompt "What is a list?" --chat',
            "/path/to/dbrx --file prompts.jsonl --output out.jsonl",
        ),
        "chat": ("", '/path/to/dbrx --system "Answer in one sentence."'),
        "serve": ("", "/path/to/dbrx --port 8080 --api-key-file keys.txt"),
        "plan": ("132b-instruct --on h100-1 --quantization int4", "/path/to/dbrx --on v5e-64 --batch 64"),
        "info": ("",),
    },
)
