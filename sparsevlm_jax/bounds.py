"""How much a file may ask for. Everything beyond is refused before it costs memory or time.

Each bound lies well above what any published LLaVA checkpoint holds, and low enough that what is refused, or just
accepted, takes less than two seconds and a gigabyte.
"""

# Text.
JSON_BYTES = 4_000_000  # an index of LLaVA-1.5-13B has 0.08 MB, a manifest 0.4 MB; Python takes up to 100 times as much
JSON_DEPTH = 40  # nested lists and objects; a config.json has 4 levels
JSON_DIGITS = 100  # of one number; a float64 needs 17, a size 20
TOKENIZER_BYTES = 40_000_000  # Vicuna's tokenizer.json has 1.8 MB, those of 256,000 tokens have 33 MB
