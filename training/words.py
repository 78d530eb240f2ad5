"""The tokenizers of trained models, and the demo model's words: a word is a token, and the words are those of the
questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.questions import ANSWERS

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNKNOWN, BEGIN, END, PAD, IMAGE = range(len(SPECIAL))
TURNS = ("user:", "assistant:")
FUNCTION_WORDS = (
    *("what", "which", "where", "how", "many", "is", "are", "at", "the", "there", "a"),
    *("digit", "digits", "colour"),
)
Spellings = Sequence[tuple[str, str]]  # how a word may be written, and how it is in the vocabulary
SPELLINGS = (("color", "colour"), ("center", "centre"))


def number_words(words: Sequence[str]) -> dict[str, int]:
    """Ids of a vocabulary: special tokens and the words of turns, the same in all, and these words behind them."""
    return {word: number for number, word in enumerate((*SPECIAL, *TURNS, *words))}


ID = number_words((*FUNCTION_WORDS, *ANSWERS))
VOCABULARY = tuple(ID)
# Roles as the words above; pictures before the question, as everywhere in the training set.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def encode(text: str, ids: Mapping[str, int]) -> list[int]:
    """Ids of a question, as the tokenizer gives them."""
    return [ids[word] for word in text.rstrip("?").split()]


def tokenizer(ids: Mapping[str, int], spellings: Spellings) -> Any:
    """The same as a `tokenizers.Tokenizer`: lower case, punctuation left out, unknown words as `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(dict(ids), unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[?.!,]"), " "),
            *(normalizers.Replace(Regex(rf"\b{written}\b"), meant) for written, meant in spellings),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
