"""Texts that tokenizers stumble over."""

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind at all",
    "def add(a, b):\n    return a + b  # the sum\n\n\tif a == b: print('same')",
    "naïve café, über straße, señor; 漢字かな交じり文, 한국어, кириллица",
    "emoji 🙂 family 👨‍👩‍👧‍👦 flag 🇪🇺 combining e\u0301 and a\u0308",
    "  two blanks   three    four \r\n windows\u00a0nbsp \u200b zero width",
]
