"""Strings on which tokenizers differ when they differ: generated, the same on every run, at least 1,000 of them."""

from __future__ import annotations

import random
import unicodedata

NUM_MIXED = 500

EMOJI = [
    "👩\u200d🚀",
    "🧑🏽\u200d💻",
    "👨\u200d👩\u200d👧\u200d👦",
    "🏳️\u200d🌈",
    "🏴\u200d☠️",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "🇯🇵🇧🇷🇫🇷",
    "1️⃣2️⃣#️⃣",
    "❤️\u200d🔥",
    "☁️",
    "☁",
    "✌🏿",
    "👍👍🏻👍🏿",
    "🫱🏼\u200d🫲🏾",
    "🧜\u200d♀️🧜\u200d♂️",
    "😀😃😄",
    "👁️\u200d🗨️",
    "⏱️⌚",
    "‼️⁉️",
    "🅰️🆎",
    "🀄🃏",
    "🫠🫥",
]
CJK = (
    "東京は夜の七時",
    "吾輩は猫である。名前はまだ無い。",
    "カタカナとひらがなと漢字",
    "ｶﾀｶﾅ半角",
    "中文没有空格，标点也不同。",
    "繁體中文與「引號」",
    "𠮷野家𠀋𡈽",
    "한국어 문장입니다.",
    "한글",
    "々〆〇ー・…",
    "ㄅㄆㄇㄈ",
    "㊗️㊙️㋿",
    "ゔヷが",
    "日本語とEnglishと한국어",
)
COMBINING = (
    "é",
    "a" + "́̂̃̈" * 5,
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "ñandú",
    "Å̊Å",
    "ệ ệ ệ",
    "x̅y̅ ̅alone",
    "č̣ ḍ̇ ḍ̇",
    "İstanbul ı̇",
    "ﬁ ﬀ ﬃ ﬅ ﬆ",
    "a⃝b⃞",
    "नमस्ते दुनिया क्षत्रिय",
    "தமிழ் மொழி கொ",
    "ภาษาไทยที่นี่ ก็",
    "ভাষা বাংলা",
    "မြန်မာ ခေါ်",
    "བོད་སྐད་ཡིག",
    "ខ្មែរ ស្ត្រី",
)
RIGHT_TO_LEFT = (
    "שלום עולם",
    "בְּרֵאשִׁית בָּרָא",
    "مرحبا بالعالم",
    "اللُّغَةُ العَرَبِيَّةُ",
    "هذا ١٢٣ وهذا 123",
    "سلام‌ها",
    "\u200fABC\u200e אבג",
    "\u202bembedded\u202c \u202eoverride\u202c \u2066isolate\u2069",
    "ﷺ ﷽ ﻼ",
    "ܫܠܡܐ ދިވެހި ߒߞߏ",
)
BLANKS = (
    " ",
    "  ",
    "       ",
    "\t",
    "\t\t  \t",
    "\n",
    "\n\n\n",
    "\r\n\r\n",
    "\r\r",
    " \n \n ",
    "   leading",
    "trailing   ",
    "a b  c   d    e",
    "line\n\n\n  next",
    "tab\tstop\t\tstops",
    "nbsp\u00a0\u00a0nbsp",
    "ideographic\u3000\u3000space",
    "thin\u2009\u200a\u202f\u205fspaces",
    "\u2028line\u2029paragraph",
    "zero\u200bwidth\u2060\ufeffjoins",
    "\x0bvertical\x0cform",
    "\x85next\x85line",
    "\u1680ogham",
    " \u00a0 \u3000 ",
    "x \r\n y",
    "  \n\t x",
)
CODE = (
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }\n\n}",
    "\tif err != nil {\n\t\treturn nil, err\n\t}\n",
    "SELECT * FROM t WHERE a='it''s' AND b>=1.5e-3;",
    '<div class="a b">\n  <p>&nbsp;&amp;</p>\n</div>',
    "#include <stdio.h>\n#define X(a) #a##_b",
    "https://example.org/a/b?c=d&e=%20#f",
    "C:\\Users\\name\\file.txt //server/share\n//\n/* x */\r\n",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case HTTPServer2XMLParser",
    "[[[]]]{{{}}}((()))<<<>>>",
    "a=b==c!=d<=e>=f&&g||!h??i?.j=>k->l::m",
    "$HOME ${VAR:-x} $(cmd) `cmd` ~/.bashrc",
    '{"a": [1, 2.5, -3e10, null, true], "b\\n": "\\u00e9"}',
    "/////\n\n//\r\n/ / /",
    "...!!!???,,,;;;:::---___***###",
    "==== Title ====\n----\n",
    "0x1F 0b101 0o17 1_000_000 1e-9 .5 5.",
)
CONTROLS = (
    "\x01\x02\x03",
    "a\x00b",
    "\x1b[31mred\x1b[0m",
    "\x7f\x80\x9f",
    "bell\x07 back\x08space",
    "\ufffd replacement \ufffd\ufffd",
    "\ufffe\uffff\U0001ffff",
    "\ue000\uf8ff\U000f0000 private",
    "\U000e0041\U000e0042 tags \U000e007f",
    "\u00ad soft\u00adhyphen",
    "\ufe0f\ufe0f \u200d\u200d",
    "\u0378\u0379 unassigned \U0001fc00",
)
DIGITS = (
    "0",
    "12",
    "123",
    "1234",
    "1234567890",
    "3.14159",
    "1,234,567.89",
    "2025-12-31T23:59:59Z",
    "v1.2.3-rc4",
    "１２３４５",
    "٠١٢٣٤٥",
    "०१२३",
    "Ⅳ Ⅻ ⅷ",
    "½ ¾ ⅓",
    "x² y³ z₁₂",
    "①②③ ⓪",
    "𝟏𝟐𝟑 𝟘𝟙",
    "1a2b3c a1b2c3",
    "12 345 6789 01234",
    "١٢٣abc123",
)
SPECIALS = (
    "<|endoftext|>",
    "<|start|>user<|message|>hi<|end|>",
    "a<|start|>b",
    " <|end|> ",
    "<|start|><|start|><|end|>",
    "<|start|",
    "|start|>",
    "<|START|>",
    "<|start|>\n<|channel|>\n",
    "< |start|>",
    "<|channel|>analysis<|message|>…<|return|>",
    "text<|call|>text",
    "<|unknown|>",
    "<<|end|>>",
    "é<|end|>é",
    "   <|end|>   ",
    "<think>why</think>",
    "x<think>y",
    "<|end|><think><|start|>",
    "<obs 1> <obs  1>",
    "《工具》 tool",
)
CASES = (
    "I'm you're he'll we've she'd it's don't",
    "I'M YOU'RE HE'LL WE'VE SHE'D IT'S DON'T",
    "I’m it’s ‘quoted’ ’s 's 't",
    "a's'd'll'x 'ſ it'ſ",
    "Hello World HELLO world hELLO",
    "iPhone McDonald XMLHttpRequest eBay",
    "ÉCOLE École école ÀÉÎÕÜ",
    "ΑΒΓ Αλφα αβγ ΆΈΉ",
    "ПРИВЕТ Привет привет МОСКВА",
    "Straße STRASSE ẞ",
    "ǅ ǈ ǋ ǲ ᾈ ǅungla",
    "ʰʲʷ ˈstress ˌsecondary",
    "ÑandÚ ñANDú aÉb AéB",
    "naïve façade Ångström Łódź İstanbul",
    "ქართული ᲥᲐᲠᲗᲣᲚᲘ",
    "Հայերեն ՀԱՅԵՐԵՆ",
    "Ꭰ ꭰ Ꮳ",
    "𝐀𝐁𝐂 𝒶𝒷𝒸 ＡＢＣ ａｂｃ",
)
PROSE = (
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë.",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ο καλύμνιος σφουγγαράς ψιθύρισε πως θα βουτήξει.",
    "Tôi có thể ăn thủy tinh mà không hại gì.",
    "Pijamalı hasta yağız şoföre çabucak güvendi.",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "“Quoted” — dashed – «guillemets» … ¿qué? ¡sí! §5 ©2025 €5 £3 ¥100 50% 30°",
    "ok.Then?Yes!No,wait;stop:go",
)
GROUPS = (
    *(EMOJI, CJK, COMBINING, RIGHT_TO_LEFT, BLANKS, CODE),
    *(CONTROLS, DIGITS, SPECIALS, CASES, PROSE),
)


def conformance_strings() -> list[str]:
    """The strings, no two the same; the first is empty."""
    rng = random.Random(20250807)
    strings = ["", *(text for group in GROUPS for text in group)]
    for text in strings[1:]:
        strings_of_it = (f" {text}", f"{text} ", f"{text}\n{text}", f"a{text}b", unicodedata.normalize("NFD", text))
        strings = [*strings, *strings_of_it]
    for _ in range(NUM_MIXED):
        parts = [rng.choice(rng.choice(GROUPS)) for _ in range(rng.randint(2, 6))]
        strings.append(rng.choice(("", " ", "\n", "'s ")).join(parts))
    for _ in range(NUM_MIXED // 2):
        pool = "".join(rng.choice(rng.choice(GROUPS)) for _ in range(3))
        strings.append("".join(rng.choices(pool, k=rng.randint(1, 60))))
    return list(dict.fromkeys(strings))
