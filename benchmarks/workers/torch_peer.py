"""Worker of transformers 4.57.6 on torch, in a virtual environment without dbrx_jax.

transformers from 5.0 on computes DBRX wrongly, which the harness' comparison of logits reports.
"""

import os
import platform
import time

import torch
import transformers

from benchmarks.workers.serve import Engine, Generated, run


class Transformers(Engine):
    def load(self, folder: str, dtype: str) -> dict[str, str]:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.DbrxForCausalLM.from_pretrained(
            folder, torch_dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model = model.to(self.device).eval()
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> list[float]:
        return self.model(torch.tensor([prompt], device=self.device), logits_to_keep=1).logits[0, -1].float().tolist()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        cache = transformers.DynamicCache()
        out = self.model(
            torch.tensor(prompts, device=self.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        sampled = [out.logits[:, -1].argmax(-1, keepdim=True)]
        first = self._now()
        for _ in range(tokens - 1):
            out = self.model(sampled[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            sampled.append(out.logits[:, -1].argmax(-1, keepdim=True))
        end = self._now()
        return Generated(torch.cat(sampled, 1).tolist(), first, end)

    def _now(self) -> float:
        """Waits for the device; returns the time."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    run(Transformers())
