"""The ways in which tools pack integers into words, and store zero points, by name.

`loaders.modules.encoding` says what each of them means.
"""

STREAM, ALIGNED, TILES, AWQ, GPTQ = "stream", "aligned", "tiles", "awq", "gptq"
TRANSPOSED = (AWQ, GPTQ)
LESS_ONE, LESS_ONE_BORROWED = "less_one", "less_one_borrowed"
MIDDLE, MIDDLE_LESS_ONE = "middle", "middle_less_one"
