"""Program of each process in test_distributed.py: compares the library on a mesh with one device.

distributed_worker.py COORDINATOR PROCESSES PROCESS_ID START_SECONDS LOST_SECONDS TASK [MESH [FOLDER]]
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.checkpoint.huggingface import HuggingFaceFolder
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.parameters import parameters_of
from dbrx_jax.console import run
from dbrx_jax.errors import CheckpointError, GenerationError
from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.sharding import distributed

FUSED = Path(__file__).parents[1] / "golden" / "fused"


class IdTokenizer:
    """A tokenizer that decodes a token to its id in angle brackets."""

    def token_bytes(self, token, skip_special_tokens=False):
        return b"<%d>" % token


def check_library(mesh):
    """Checks that results and parameters match one device and that only rows of local shards are read."""
    read, rows = set(), HuggingFaceFolder.rows
    HuggingFaceFolder.rows = lambda self, name, a, b: (read.add((name, a, b)), rows(self, name, a, b))[1]
    many = DbrxForCausalLM.from_pretrained(FUSED, mesh, dtype="float32")
    HuggingFaceFolder.rows = rows
    # The experts of this process are those of its devices along `expert`.
    shards = {np.argwhere(many.partition.mesh.devices == d)[0] @ (0, 0, 1, 0) for d in jax.local_devices()}
    per_shard = many.config.moe_num_experts // many.partition.size("expert")
    experts = {int(name.split(".")[4]) for name, *_ in read if ".experts." in name}
    assert experts == {x * per_shard + i for x in shards for i in range(per_shard)}, (shards, experts)
    assert len(experts) < many.config.moe_num_experts or len(shards) == many.partition.size("expert")

    one = DbrxForCausalLM.from_pretrained(FUSED, dtype="float32")
    e = dict(np.load(FUSED / "expected.npz"))
    batch, valid = (e["tokens"], e["mask"]), e["mask"].astype(bool)
    logits = process_allgather(many(*batch), tiled=True)
    np.testing.assert_allclose(logits[valid], e["logits"][valid], rtol=0, atol=1e-4)
    greedy = e["greedy"]
    stops = [f"<{greedy[0, 1]}>", f"<{greedy[1, 2]}>"]
    options = {"max_new_tokens": greedy.shape[1], "eos_token_id": None, "burst": 2}
    results = []
    for model in (many, one):
        stream = TokenStream(model, *batch, stop_strings=stops, tokenizer=IdTokenizer(), **options)
        stream.compile()
        list(stream)
        results.append((stream.sequences, stream.lengths))
    np.testing.assert_array_equal(*(sequences for sequences, _ in results))
    np.testing.assert_array_equal(*(lengths for _, lengths in results))
    options = {"do_sample": True, "max_new_tokens": 5, "top_p": 0.9}
    np.testing.assert_array_equal(*(model.generate(*batch, seed=3, **options) for model in (many, one)))
    unseeded = many.generate(*batch, **options)  # all processes use one random seed
    assert (process_allgather(unseeded) == unseeded).all()
    # A criterion that looks at the clock may answer otherwise in each process; one answer holds for all.
    width = batch[0].shape[1]
    ended = many.generate(*batch, stopping_criteria=lambda s, _: s.shape[1] > width + jax.process_index(), **options)
    assert (process_allgather(ended) == ended).all()
    sharded, reference = parameters_of(many), parameters_of(one)
    for name in ("embedding", "lm_head", "blocks.1.attention.query", "blocks.2.moe.experts.13.w1", "norm_f.scale"):
        np.testing.assert_array_equal(process_allgather(sharded[name], tiled=True), reference[name])


def check_saving(mesh, folder):
    """Checks that a model of two processes is saved with the bytes of one device, and that both hear of an error."""
    DbrxForCausalLM.from_pretrained(FUSED, mesh, quantization="int8", dtype="float32").save_pretrained(folder / "many")
    if jax.process_index() == 0:
        DbrxForCausalLM.from_pretrained(FUSED, quantization="int8", dtype="float32").save_pretrained(folder / "one")
        many, one = (open_folder(folder / name, verify=True) for name in ("many", "one"))
        assert many.records == one.records
    plain = DbrxForCausalLM.from_pretrained(FUSED, mesh, dtype="bfloat16")
    plain.save_pretrained(folder / "hf", "hf")
    again = parameters_of(DbrxForCausalLM.from_pretrained(folder / "hf", mesh))
    for name, parameter in parameters_of(plain).items():
        for a, b in zip(parameter.addressable_shards, again[name].addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(a.data).view(np.uint16), np.asarray(b.data).view(np.uint16))
    try:
        plain.save_pretrained(folder / "hf", "hf")
    except CheckpointError as error:
        assert str(error).startswith(("process 0 could not save", f"{folder / 'hf'}: exists already")), error
        return
    raise AssertionError("a folder was written over")


def task(name, mesh=None, folder=None):
    if name == "library":
        check_library(mesh)
    elif name == "save":
        check_saving(mesh, Path(folder))
    elif name == "fail" and jax.process_index() == 1:
        raise GenerationError("a mistake of one process alone")
    else:  # communicate until a process is lost
        for step in range(1_000_000):
            process_allgather(np.ones(1))
            if step == 3:
                print("running", flush=True)
                distributed.check_same("a text", "that all have")
            time.sleep(0.01)


def main():
    coordinator, *numbers = sys.argv[1:6]
    processes, process_id, start_seconds, lost_seconds = map(int, numbers)
    with distributed.start(coordinator, processes, process_id, start_seconds=start_seconds, lost_seconds=lost_seconds):
        task(*sys.argv[6:])
        print("fine")


if __name__ == "__main__":
    run("worker", main)
