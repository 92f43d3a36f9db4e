"""A byte-pair vocabulary in CLIP's format, learnt from the captions and the words that attacks use."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from train_mini.settings import TOKENS

END_OF_WORD = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# Words that DreamBooth prompts and edits need as whole tokens though no caption has them.
EXTRA = "sks person zwx xyz boy girl face painting drawing picture in the style of image mountain beach city dslr"


def build_tokenizer(captions: list[str], folder: Path, vocabulary: int) -> CLIPTokenizer:
    """Learn the merges from `captions`, save the tokenizer to `folder` and return it; any text tokenises."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD, unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *[EXTRA] * 20], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    for letter in alphabet:  # every character needs both its inner and its final form
        for form in (letter, letter + END_OF_WORD):
            vocab.setdefault(form, len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    clip = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=END,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )
    clip.save_pretrained(folder)
    return clip
