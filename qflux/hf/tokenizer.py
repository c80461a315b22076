"""Vocabularies as Hugging Face tokenizers."""

from __future__ import annotations

import math

from transformers import PreTrainedTokenizerFast

from ..text.vocabulary import CharacterVocabulary, Vocabulary, to_tokenizer

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
# The share of characters that are new to a vocabulary of characters. A code that can spell every
# text has to set a share aside, and this one costs the known characters 1e-6 nats each.
NEW_CHARACTERS = 1e-6
CODE_POINTS = 0x110000


def unknown_cost(vocabulary: Vocabulary) -> float | None:
    """What a character costs that the vocabulary does not have, in nats; None where it has all.

    It is announced as new, with probability `NEW_CHARACTERS`, and is then any of the code points
    that are not in the vocabulary, each as likely: about 28 nats or 40 bits.
    """
    if not isinstance(vocabulary, CharacterVocabulary):
        return None
    return math.log(CODE_POINTS - vocabulary.size) - math.log(NEW_CHARACTERS)


def make_tokenizer(vocabulary: Vocabulary, context_length: int) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer with the ids of `vocabulary`.

    It pads on the left, where generation needs it. Its end-of-text token, which also pads, is
    GPT-2's where the vocabulary has it. Otherwise it is one id more than the model has, and
    `QFluxConfig.stand_in` says what the model reads for it. Characters that a vocabulary of
    characters does not have become its unknown token, the id after that.
    """
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if unknown_cost(vocabulary) is None:
        tokenizer = to_tokenizer(vocabulary)
    else:
        tokenizer = to_tokenizer(vocabulary, further=(END_OF_TEXT, UNKNOWN))
        special["unk_token"] = UNKNOWN
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )
