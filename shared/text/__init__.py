"""Text in, tokens out, and back: what the ingress and the engines must agree on."""

from shared.text.chat import ChatMessage, ChatTemplate
from shared.text.checkpoint import load_tokenizer
from shared.text.detokenizer import IncrementalDetokenizer
from shared.text.stop import StopMatcher
from shared.text.tokenizer import Tokenizer, byte_tokenizer

__all__ = [
    "ChatMessage",
    "ChatTemplate",
    "IncrementalDetokenizer",
    "StopMatcher",
    "Tokenizer",
    "byte_tokenizer",
    "load_tokenizer",
]
