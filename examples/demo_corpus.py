"""The corpus of the demo checkpoint: Python's documentation, and WordNet as questions and answers.

Both come from Debian packages under permissive terms (PSF-2.0, and the WordNet licence):

    apt-get download python3.11-doc wordnet-base
    for package in *.deb; do dpkg -x "$package" CORPUS; done
"""

import random
import re
import textwrap
from pathlib import Path

DOCS = "usr/share/doc/python3.11/html/_sources"
DOC_PARTS = ("library", "tutorial", "howto", "reference", "faq")
WORDNET = "usr/share/wordnet"
QUESTIONS = {
    "noun": ("What is {a} {word}?", "Define {word}.", "What does {word} mean?", "What is the meaning of {word}?"),
    "verb": ("What does it mean to {word}?", "Define {word}.", "What does {word} mean?"),
    "adj": ("What does {word} mean?", "Define {word}.", "When is something {word}?"),
}
# Written for this demo, so that a first word to it gets an answer in kind.
SMALL_TALK = {
    "Hello!": "Hello! Ask me what a word means.",
    "Hi": "Hello! Which word would you like to know?",
    "Who are you?": "I am a very small DBRX, trained on Python's documentation and on WordNet.",
    "What are you?": "I am a demo of DBRX: a mixture of sixteen small experts, of which each token uses four.",
    "What can you do?": "I can try to say what a word means, and I can write text that looks like documentation.",
    "Thank you": "You are welcome.",
    "Good morning": "Good morning! Ask me what a word means.",
    "Goodbye": "Goodbye!",
}


def documents(corpus: Path) -> list[str]:
    """Python's documentation, one page each."""
    pages = sorted(p for part in DOC_PARTS for p in (corpus / DOCS / part).glob("*.rst.txt"))
    if not pages:
        raise SystemExit(f"{corpus / DOCS}: no pages found; unpack the package python3.11-doc into {corpus}")
    return [page.read_text(encoding="utf-8") for page in pages]


def chats(corpus: Path) -> list[tuple[str, str]]:
    """(question, answer) pairs: a definition of WordNet's each, and the small talk."""
    pairs = []
    for part, questions in QUESTIONS.items():
        path = corpus / WORDNET / f"data.{part}"
        if not path.exists():
            raise SystemExit(f"{path}: not found; unpack the package wordnet-base into {corpus}")
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            word = re.sub(r"\(.*\)", "", fields.split()[4]).replace("_", " ")
            definition = gloss.split('; "')[0].split(';"')[0].strip()
            if not word.isascii() or word != word.lower() or any(c.isdigit() for c in word) or len(definition) > 240:
                continue  # proper names, species, and what is too long to be a demo's answer
            rng = random.Random(line)
            question = rng.choice(questions).format(word=word, a="an" if word[0] in "aeiou" else "a")
            pairs.append((question, definition[0].upper() + definition[1:] + "."))
    return pairs + list(SMALL_TALK.items()) * 100


def small_pieces(text: str, width: int = 400) -> list[str]:
    """A page cut into paragraphs of bounded length, to train the tokenizer on."""
    return [
        piece for paragraph in text.split("\n\n") for piece in textwrap.wrap(paragraph, width, replace_whitespace=False)
    ]
