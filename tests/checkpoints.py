"""Tokenizer folders of the families in use, made on the spot: no download, a few kilobytes."""

import json
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.texts import CORPUS

LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim"
    " + '<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
SPECIALS = ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|eot|>"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: BPE over bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<tool>", "naïve"])  # pyright: ignore[reportUnknownMemberType]  # their stubs
    return made


def sentencepiece() -> Tokenizer:
    """As Llama 2, Mistral and Gemma: pieces with a mark for blanks, bytes for what is unknown."""
    pieces = ["<|unk|>", *SPECIALS, *[f"<0x{byte:02X}>" for byte in range(256)], "▁"]
    pieces += sorted({char for line in CORPUS for char in line if char.isascii() and char != " "})
    merges: list[tuple[str, str]] = []
    for left, right in (("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "▁")):
        merges.append((left, right))
        pieces.append(left + right)
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<|unk|>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    made.add_special_tokens(SPECIALS)  # pyright: ignore[reportUnknownMemberType]  # their stubs
    return made


def metaspace() -> Tokenizer:
    """One that cannot be tabulated."""
    made = Tokenizer(models.Unigram([("<|unk|>", 0.0)], unk_id=0, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<|unk|>", *SPECIALS],
        unk_token="<|unk|>",
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def with_bos(made: Tokenizer) -> Tokenizer:
    """``made``, as a model that wants its first token before every prompt."""
    made.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", made.token_to_id("<|bos|>"))]
    )
    return made


FAMILIES = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


def write_folder(folder: Path, made: Tokenizer, **config: object) -> str:
    """A checkpoint folder with ``made`` as its tokenizer; the path."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eos|>", "special": True},
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config), encoding="utf-8")
    return str(folder)
