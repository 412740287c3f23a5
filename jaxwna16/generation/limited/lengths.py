"""How much text tokens may stand for."""

MOST_CHARACTERS = 4096
"""Of one token, or of several in the mean; the longest of published models have 512."""


def check_length(text: str, tokens: int) -> None:
    """Refuse more text than tokens of a language stand for: looking at it takes time, too.

    Raises:
      ValueError: if it has more than `MOST_CHARACTERS` for each token and one more.
    """
    if len(text) > MOST_CHARACTERS * (tokens + 1):
        raise ValueError(
            f"{tokens:,} tokens are {len(text):,} characters, expected {MOST_CHARACTERS:,} each"
        )
