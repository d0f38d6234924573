"""Writes what the logits processors of transformers 4.57.6 make of random logits. Needs torch, not dbrx_jax.

    python process_logits.py OUT

OUT is an npz file: `cases`, a JSON list of vocabulary size, options, prompt width and length so far, and for case i the
arrays ids{i} (B, T), logits{i} (B, V) and probabilities{i} (B, V) after all processors.
"""

import itertools
import json
import sys

import numpy as np
import torch
from transformers import DbrxConfig, DbrxForCausalLM, GenerationConfig

ROWS = 200
VOCABULARIES = (2, 3, 5, 17, 64)
PAIR_VOCABULARY = 17
EOS, WIDTH, MAX_LENGTH = 1, 6, 12


def options(generator: np.random.Generator, vocabulary: int) -> dict:
    """Returns a random value of each option."""

    def ids(count: int) -> list[int]:
        return [int(i) for i in generator.integers(1, vocabulary, count)]  # transformers refuses 0 in sequences

    return {
        "temperature": float(generator.uniform(0.3, 2.5)),
        "top_k": int(generator.integers(1, vocabulary + 2)),
        "top_p": float(generator.uniform(0.05, 0.99)),
        "min_p": float(generator.uniform(0.01, 0.9)),
        "typical_p": float(generator.uniform(0.05, 0.95)),
        "epsilon_cutoff": float(generator.uniform(0.001, 0.3)),
        "eta_cutoff": float(generator.uniform(0.001, 0.3)),
        "repetition_penalty": float(generator.uniform(0.5, 2)),
        "no_repeat_ngram_size": int(generator.integers(1, 4)),
        "bad_words_ids": [ids(1), ids(2), ids(3), [EOS]],
        "sequence_bias": [[ids(1), -1.5], [ids(2), 2.5]],
        "min_length": int(generator.integers(1, MAX_LENGTH)),
        "min_new_tokens": int(generator.integers(1, MAX_LENGTH - WIDTH)),
        "forced_eos_token_id": EOS,
        "exponential_decay_length_penalty": [int(generator.integers(0, 4)), float(generator.uniform(0.8, 1.5))],
        "suppress_tokens": ids(1),
        "begin_suppress_tokens": ids(1),
        "renormalize_logits": True,
    }


def case_names(vocabulary: int) -> list[tuple[str, ...]]:
    names = list(options(np.random.default_rng(0), vocabulary))
    pairs = list(itertools.combinations(names, 2)) if vocabulary == PAIR_VOCABULARY else []
    return [(name,) for name in names] + pairs


def main(out: str) -> None:
    model = DbrxForCausalLM(DbrxConfig(d_model=8, n_heads=1, n_layers=1, vocab_size=8))
    cases, arrays = [], {}
    for vocabulary in VOCABULARIES:
        for names in case_names(vocabulary):
            generator = np.random.default_rng(len(cases))
            length = int(generator.integers(WIDTH, MAX_LENGTH))
            given = {name: options(generator, vocabulary)[name] for name in names}
            ids = generator.integers(0, vocabulary, (ROWS, length))
            logits = generator.normal(0, 3, (ROWS, vocabulary)).astype(np.float32)
            logits[::2] = np.round(logits[::2])  # ties
            config = GenerationConfig(
                **{"top_k": 0, **given}, do_sample=True, eos_token_id=EOS, pad_token_id=0, max_length=MAX_LENGTH
            )
            model._prepare_special_tokens(config)
            processors = model._get_logits_processor(config, input_ids_seq_length=WIDTH, device="cpu")
            scores = processors(torch.tensor(ids), torch.tensor(logits))
            i = len(cases)
            cases.append([vocabulary, given, WIDTH, length, MAX_LENGTH, EOS])
            arrays |= {f"ids{i}": ids, f"logits{i}": logits, f"probabilities{i}": scores.softmax(-1).numpy()}
    np.savez(out, cases=json.dumps(cases), **arrays)


main(sys.argv[1])
