"""Trains the demo checkpoint that comes with dbrx_jax, from its corpus to its Hugging Face folder.

    pip install '.[demo]'
    python examples/train_demo.py --corpus CORPUS --out OUT --minutes 60

See demo_corpus.py for how to get CORPUS. Everything is seeded; the number of steps that fit in the
time given depends on the machine. Training is not resumable: it is an hour at most.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from demo_corpus import chats, documents, small_pieces
from flax import nnx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dbrx_jax.api import DbrxForCausalLM
from dbrx_jax.checkpoint.parameters import parameters_of
from dbrx_jax.config import DbrxConfig
from dbrx_jax.text.vocabulary import SPLIT_REGEX, UNUSED_TOKEN
from dbrx_jax.training.step import losses, make_step

RANKS = 2544
SPECIAL = {"<|endoftext|>": 2550, "<|pad|>": 2551, "<|im_start|>": 2552, "<|im_end|>": 2553}
TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_SHARE = 0.45  # of a batch's rows
HELD_OUT = 0.02  # of the pages and of the chats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    args = parser.parse_args()

    pages, pairs = documents(args.corpus), chats(args.corpus)
    rng = random.Random(0)
    rng.shuffle(pages)
    rng.shuffle(pairs)
    tokenizer = train_tokenizer(pages, pairs)
    page_ids = [[*ids, SPECIAL["<|endoftext|>"]] for ids in (e.ids for e in tokenizer.encode_batch(pages))]
    chat_ids, chat_bytes = chat_tokens(tokenizer, pairs)
    held_pages, held_chats = math.ceil(len(pages) * HELD_OUT), math.ceil(len(pairs) * HELD_OUT)
    print_status(
        f"{len(pages)} pages of {sum(map(len, page_ids)):,} tokens, "
        f"{len(pairs)} chats of {sum(map(len, chat_ids)):,} tokens"
    )
    page_stream = np.concatenate([np.array(ids, np.int32) for ids in page_ids[held_pages:]])
    chat_stream = np.concatenate([np.array(ids, np.int32) for ids in chat_ids[held_chats:]])

    config = dataclasses.replace(DbrxConfig.from_name("demo"), dtype="float32")
    model = DbrxForCausalLM(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    params, steps, curve = train(graph, params, page_stream, chat_stream, args)
    model = nnx.merge(graph, params)

    rounded = {name: value.astype(jnp.bfloat16) for name, value in parameters_of(model).items()}
    config = dataclasses.replace(config, dtype="bfloat16")
    DbrxForCausalLM.from_parameters(config, rounded).save_pretrained(args.out, format="hf")
    write_tokenizer(tokenizer, args.out)
    scored = DbrxForCausalLM.from_parameters(config, {k: v.astype(jnp.float32) for k, v in rounded.items()})
    figures = {
        "steps": steps,
        "tokens_per_step": args.batch * args.length,
        "final_training_cross_entropy_nats": curve[-1],
        "held_out_bits_per_byte_documentation": bits_per_byte(
            scored, page_ids[:held_pages], sum(len(p.encode()) for p in pages[:held_pages]), args
        ),
        "held_out_bits_per_byte_chat": bits_per_byte(scored, chat_ids[:held_chats], sum(chat_bytes[:held_chats]), args),
        "held_out_documents": held_pages,
        "held_out_chats": held_chats,
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print_status(json.dumps(figures, indent=2))


def train_tokenizer(pages: list[str], pairs: list[tuple[str, str]]) -> Tokenizer:
    """A byte-level BPE of RANKS entries; the special tokens get their ids apart from it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RANKS, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [piece for page in pages for piece in small_pieces(page)] + [f"user\n{q}\nassistant\n{a}" for q, a in pairs]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def chat_tokens(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[int]]:
    """Each pair in ChatML as token ids, and the bytes of its text."""
    start, end, stop = SPECIAL["<|im_start|>"], SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]
    pieces = [text for q, a in pairs for text in (f"user\n{q}", f"assistant\n{a}")]
    ids = [e.ids for e in tokenizer.encode_batch(pieces)]
    newline = tokenizer.encode("\n").ids
    rows = [[start, *ids[i], end, *newline, start, *ids[i + 1], end, stop] for i in range(0, len(ids), 2)]
    return rows, [len((pieces[i] + pieces[i + 1]).encode()) + 1 for i in range(0, len(pieces), 2)]


def train(graph, params, page_stream, chat_stream, args):
    """AdamW with warm-up and a cosine to a tenth, over as many steps as the time allows."""
    rng = np.random.default_rng(0)
    chat_rows = round(args.batch * CHAT_SHARE)

    def batch() -> np.ndarray:
        rows = []
        for stream, count in ((page_stream, args.batch - chat_rows), (chat_stream, chat_rows)):
            starts = rng.integers(0, len(stream) - args.length - 1, count)
            rows += [stream[s : s + args.length + 1] for s in starts]
        return np.stack(rows)

    # The schedule runs on the share of the time that is gone, handed to the optimiser as its rate.
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw)(
            learning_rate=0.0, b1=0.9, b2=0.95, weight_decay=0.05, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
    )
    state, step = optimizer.init(params), make_step(graph, optimizer)
    mask = np.ones((args.batch, args.length + 1), np.float32)
    begin, seconds, steps, curve, recent = None, args.minutes * 60, 0, [], []
    while begin is None or time.time() - begin < seconds:
        done = 0 if begin is None else (time.time() - begin) / seconds
        rate = args.lr * min(1, (steps + 1) / 100) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
        state[1].hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        params, state, result, norm = step(params, state, batch(), mask)
        recent.append(float(result.cross_entropy))
        begin = begin or time.time()  # compiling is not training
        steps += 1
        if steps % 50 == 0:
            curve.append(float(np.mean(recent)))
            rate_now = steps * args.batch * args.length / (time.time() - begin)
            print_status(
                f"step {steps}  loss {curve[-1]:.3f}  balance {float(result.balance):.2f}  norm {float(norm):.2f}  "
                f"lr {rate:.1e}  {rate_now:.0f} tokens/s  {100 * done:.0f} %"
            )
            recent = []
    return params, steps, curve


def bits_per_byte(model, rows: list[list[int]], size: int, args) -> float:
    """Cross entropy of held-out text in windows of the training length, over its bytes.

    The first token of a window is not scored, which leaves out under one token in 250.
    """
    graph, params = nnx.split(model)
    score = jax.jit(lambda p, t, m: losses(nnx.merge(graph, p), t, m).cross_entropy)
    stream = np.concatenate([np.array(r, np.int32) for r in rows])
    count = (len(stream) - 1) // args.length
    total = 0.0
    for i in range(count):
        window = stream[None, i * args.length : (i + 1) * args.length + 1]
        total += float(score(params, window, np.ones(window.shape, np.float32)))
    return total / count * (len(stream) - 1) / math.log(2) / size


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json, as transformers reads them."""
    data = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    # The library numbers added tokens without gaps, whatever ids they have, unless they are entries too.
    unused = range(RANKS, min(SPECIAL.values()))
    data["model"]["vocab"] |= {UNUSED_TOKEN.format(i - RANKS): i for i in unused} | SPECIAL
    data["added_tokens"] = [{"id": i, "content": text, **flags} for text, i in SPECIAL.items()]
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in SPECIAL.items()},
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "chat_template": TEMPLATE,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    stops = [SPECIAL["<|endoftext|>"], SPECIAL["<|im_end|>"]]
    generation = {"eos_token_id": stops, "pad_token_id": SPECIAL["<|pad|>"]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def print_status(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
