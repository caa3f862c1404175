"""Makes smollm2_tokens.json: what SmolLM2's tokenizer gives for many texts, by transformers.

    python make_smollm2_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2_tokens.json

Needs transformers, torch, gguf. The vocabulary is transformers' reading of the GGUF. transformers
does not know how "smollm" cuts text, so the pre-tokenizer that the model was published with (single
digits, then GPT-2's words) is put in its place; the texts where that matters are noted, and all of
them have blanks before a digit.

To stay small the file holds only the part of the vocabulary that these texts use: the special
tokens, the bytes, and every token and merge on the way to a result. Byte-pair merging never looks at
merges that do not apply, so the part gives the same tokens for the same texts.
"""

# ruff: noqa: E501
from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEXTS = [
    "Hello world",
    "The capital of France is",
    "Once upon a time, there was a lighthouse keeper.",
    "I'm sure they'll say it's fine; don't you think we've seen what he'd do?",
    "DON'T SHOUT, I'LL HEAR YOU'RE THERE",
    "O'Neill's o'clock rock'n'roll",
    "naïve café résumé façade Ångström Straße",
    "Zażółć gęślą jaźń",
    "Größenwahn über Äpfel",
    "Привет, как дела? Всё хорошо.",
    "Добрый день 2024",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！",
    "今天天气很好，我们去公园吧。",
    "日本語のテキストとカタカナ",
    "안녕하세요 세계",
    "こんにちは、元気ですか？",
    "Việt Nam đất nước",
    "😀",
    "😀😁😂🤣",
    "👍🏽 thumbs",
    "🇫🇷🇯🇵 flags",
    "👨\u200d👩\u200d👧\u200d👦 family",
    "❤️ heart ☕ ✨",
    "emoji at the end 🎉",
    "price: $1,234.56 (10% off)",
    "3.14159265358979",
    "1 22 333 4444 55555",
    "0x1F600 0b1010 1e-9",
    "2024-02-29T23:59:59Z",
    "phone +49 (0)30 123456",
    "v1.2.3-rc4",
    "½ ¾ ² ③ Ⅳ ٣",
    "x²+y²=z²",
    "def f(x):\n    return x ** 2  # square",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    "SELECT * FROM users WHERE id = 42;",
    '<html><body class="x">&amp;</body></html>',
    '{"key": [1, 2.5, null, true]}',
    'if __name__ == "__main__":\n\tmain()\n',
    "import numpy as np\nprint(np.zeros((3, 4)))",
    "https://example.org/path?query=1&x=y#frag",
    "user.name+tag@example.com",
    "C:\\Windows\\System32",
    "$$\\int_0^1 x^2 dx = \x0crac{1}{3}$$",
    "!!!???...",
    "---",
    "***bold*** _it_ `code`",
    "(((nested) parens) here)",
    "“curly” ‘quotes’ — dash…",
    "« guillemets »",
    "a",
    "z",
    ".",
    "'",
    '"',
    "ab",
    "antidisestablishmentarianism",
    "supercalifragilisticexpialidocious",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "xXxXxXxX",
    "CamelCaseAndsnake_case",
    "ALLCAPS lower MiXeD",
    "The quick brown fox jumps over the lazy dog",
    "To be, or not to be: that is the question",
    "Water boils at 100 degrees Celsius.",
    "She said: \"It's 5 o'clock!\"",
    "Dr. Smith et al. (1999), p. 12-13",
    "½ cup\xa0sugar",
    "zero\u200bwidth",
    "soft\xadhyphen",
    "\ufeffBOM",
    "é combining",
    "line\u2028separator",
    "tab\tseparated\tvalues",
    "carriage\r\nreturn\r\n",
    "form\x0cfeed",
    "bell\x07 and null\x00 bytes",
    "\x1b[31mred\x1b[0m",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "𐍈 gothic",
    "� replacement",
    "\U0010ffff last",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "a<|im_end|>b",
    "<|im_end|><|im_end|>",
    "text <|im_start|> with blanks <|im_end|> around",
    "<file_sep>x<repo_name>y",
    "<|not_special|>",
    "<|im_end",
    '#!/bin/sh\nset -e\necho "$HOME" | grep -v foo\n',
    "$$\\int_0^1 x^2 dx = \\frac{1}{3}$$",
    "Quarks, electrons and photons walk into a bar; nothing was observed.",
    "She sells sea-shells on the sea-shore; the shells she sells are sea-shells, I'm sure.",
    "## Heading\n\n- item one\n- item two\n  - nested\n\n1. first\n2. second\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "```python\nx = [i for i in range(10) if i % 2]\n```",
    'class Foo(Bar):\n    """Doc."""\n\n    def __init__(self, x: int = 0) -> None:\n        self.x = x\n',
    'fn main() {\n    println!("{}", 1 + 2);\n}\n',
    "#include <stdio.h>\nint main(void) { return 0; }",
    "let f = (a, b) => a === b ? `${a}` : null;",
    "\\begin{align} a &= b \\\\ c &= d \\end{align}",
    "SGVsbG8gd29ybGQ=",
    "deadbeefcafe0123456789abcdef",
    "550e8400-e29b-41d4-a716-446655440000",
    "192.168.0.1:8080",
    "10,000,000.00",
    "1e10 2E-5 .5 5.",
    "12:34:56.789",
    "1/2 + 3/4 = 5/4",
    "50% of 20 is 10",
    "A1B2C3",
    "4th of July 1776",
    "x1y2z3 100km 5kg",
    "wait... what?! no!!",
    "Mr. & Mrs. O'Brien-Smith's dogs' toys",
    "it's, he'll, we'd, I've, you're, 'tis, 'twas, y'all'd've",
    "can’t won’t it’s",
    "rock ’n’ roll",
    "Ça va? Où êtes-vous né?",
    "El niño comió piñata en España",
    "Ærøskøbing på øen",
    "Türkçe karakterler: ğüşiöç İI",
    "Čeština: příliš žluťoučký kůň",
    "Magyar: árvíztűrő tükörfúrógép",
    "Ελληνικά κείμενα",
    "Українська мова",
    "ქართული ენა",
    "Հայերեն",
    "தமிழ் மொழி",
    "বাংলা ভাষা",
    "ไทยไม่มีช่องว่าง",
    "한글과 English 섞어 쓰기",
    "中英文 mixed 混排 text",
    "かな漢字まじり文 ABC",
    "♔♕♖ ♠♥♦♣ ☀☁☂",
    "→ ⇒ ∀x∈ℝ ∃y ≠ ∅",
    "αβγ ∑∫√∞",
    "¡Hola! ¿Qué tal?",
    "€100 £50 ¥1000 ₹20",
    "№ 5 § 3 ¶ 2 © ® ™",
    "\u202eright to left\u202c",
    "à́̂ stacked",
    "ﬁ ligature ﬂ",
    "ｆｕｌｌｗｉｄｔｈ １２３",
    "🏳️\u200d🌈 🏴\u200d☠️ 👩🏿\u200d🚀",
    "🤷🏻\u200d♀️",
    "😀a😀b😀",
    "1️⃣2️⃣3️⃣",
    "   leading",
    "trailing   ",
    "  both  ",
    "\n\n\nlines\n\n\n",
    " \n \n ",
    "\t\tindent\n\t\t\tmore",
]
BLANKS = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\t",
    "\t\t",
    " \t ",
    "\r\n",
    "\u00a0",
    "\u3000",
]


def texts() -> list[str]:
    around = [f"{a}x{b}" for a, b in zip(BLANKS, reversed(BLANKS), strict=True)]
    between = [f"word{blank}next{blank}{blank}7{blank}!" for blank in BLANKS]
    runs = ["a" + " " * n + ("b" if n % 2 else "8") for n in range(1, 20)]
    return list(dict.fromkeys(["", *TEXTS, *BLANKS, *around, *between, *runs]))


def merges_used(word: str, rank: dict[tuple[str, str], int]) -> tuple[list[str], set]:
    """Plain byte-pair encoding of one word: its tokens and the merges that were done."""
    parts, used = list(word), set()
    while True:
        pairs = [pair for pair in itertools.pairwise(parts) if pair in rank]
        if not pairs:
            return parts, used
        best = min(pairs, key=rank.__getitem__)
        used.add(best)
        merged, i = [], 0
        while i < len(parts):
            joined = tuple(parts[i : i + 2]) == best
            merged.append("".join(best) if joined else parts[i])
            i += 2 if joined else 1
        parts = merged


def main(model: str, output: str) -> None:
    path = Path(model)
    fields = gguf.GGUFReader(path).fields
    meta = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in meta["tokenizer.ggml.merges"]]
    rank = {pair: index for index, pair in enumerate(merges)}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    cases = []
    for text in texts():
        cases.append({"text": text, "plain_ids": tokenizer(text).input_ids})
    tokenizer.backend_tokenizer.pre_tokenizer = words
    types = meta["tokenizer.ggml.token_type"]
    used, special = set(), [t for t, k in zip(tokens, types, strict=True) if k == 3]
    for case in cases:
        case["ids"] = tokenizer(case["text"]).input_ids
        case["decoded"] = tokenizer.decode(case["ids"], skip_special_tokens=True)
        if case.pop("plain_ids") != case["ids"]:
            case["needs_digit_rule"] = True
            assert re.search(r"\s\d", case["text"]), case
        for piece in re.split("(" + "|".join(map(re.escape, special)) + ")", case["text"]):
            for word, _ in words.pre_tokenize_str(piece) if piece not in special else []:
                used |= merges_used(word, rank)[1]
    kept = {"".join(pair) for pair in used} | {part for pair in used for part in pair}
    kept |= set(special) | {t for t in tokens if len(t) == 1}
    full_ids = [i for i, token in enumerate(tokens) if token in kept]
    assert {i for case in cases for i in case["ids"]} <= set(full_ids)
    small = {k: v for k, v in meta.items() if isinstance(v, (str, bool, int))}
    small = {k: full_ids.index(v) if k.endswith("_token_id") else v for k, v in small.items()}
    small["tokenizer.ggml.tokens"] = [tokens[i] for i in full_ids]
    small["tokenizer.ggml.token_type"] = [types[i] for i in full_ids]
    small["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges if pair in used]
    golden = {"metadata": small, "full_ids": full_ids, "cases": cases}
    Path(output).write_text(json.dumps(golden, separators=(",", ":")) + "\n", encoding="utf-8")
    print(len(cases), "texts,", len(full_ids), "tokens,", len(used), "merges")


if __name__ == "__main__":
    main(*sys.argv[1:])
