"""A tokenizer of whole words, kept as the two files that transformers and open_clip read (`AutoTokenizer`).

A vocabulary of the words that captions use keeps a text encoder small; the BPE vocabulary of CLIP would alone be larger
than all of ours. Case, accents and punctuation do not matter, figures 1 to 3 are words, and a word that is not known
becomes UNKNOWN: networks are trained with some of those among their captions, so that they pass over them.

Legend: B texts, L places of a text. A text is BEGIN, its words, END, then PAD. END is the highest number, where open_clip
takes a text's features from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from oneira.platform.errors import DataError

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
FIGURES = {"1": "one", "2": "two", "3": "three"}
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


class Words:
    """Texts to numbers of words."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer, self.length = tokenizer, length
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=self.number(PAD), pad_token=PAD)

    @classmethod
    def of(cls, vocabulary: Sequence[str], length: int) -> Words:
        """A tokenizer of these words, for texts of up to `length` places, BEGIN and END included."""
        numbers = {word: number for number, word in enumerate((PAD, UNKNOWN, BEGIN, *vocabulary, END))}
        tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
        figures = [normalizers.Replace(Regex(rf"\b{figure}\b"), word) for figure, word in FIGURES.items()]
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
                normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "), *figures,
            ]
        )  # fmt: skip
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ends = [(BEGIN, numbers[BEGIN]), (END, numbers[END])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
        return cls(tokenizer, length)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Numbers of the texts' words, int64 [B, L]; what is too long is cut before END."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        return np.array(rows, np.int64).reshape(-1, self.length)

    def __len__(self) -> int:
        """How many words there are, special ones included."""
        return self._tokenizer.get_vocab_size()

    def number(self, word: str) -> int:
        """Of a word; UNKNOWN's for one that is not known."""
        found = self._tokenizer.token_to_id(word)
        return self.number(UNKNOWN) if found is None else found

    def save(self, folder: Path) -> None:
        """Writes the two files into an existing folder."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.length, "pad_token": PAD,
            "unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": END, "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        (folder / TOKENIZER).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, length: int) -> Words:
        """What `save` wrote. Raises DataError when it is not there or cannot be read."""
        try:
            text = (folder / TOKENIZER).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"'{folder / TOKENIZER}' cannot be read: {error}.") from error
        try:
            return cls(Tokenizer.from_str(text), length)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"'{folder / TOKENIZER}' is no tokenizer: {error}.") from error


def with_unknown_words(tokens: np.ndarray, words: Words, rng: np.random.Generator, share: float = 0.1) -> np.ndarray:
    """A copy of tokens int64 [B, L] in which a `share` of the texts has one unknown word more, at a random place."""
    tokens = tokens.copy()
    length = tokens.shape[1]
    ends = (tokens == words.number(END)).argmax(1)
    chosen = np.flatnonzero((rng.random(len(tokens)) < share) & (ends < length - 1))
    places = rng.integers(1, ends[chosen] + 1)
    for row, place in zip(chosen, places, strict=True):
        tokens[row, place + 1 :] = tokens[row, place:-1].copy()
        tokens[row, place] = words.number(UNKNOWN)
    return tokens
