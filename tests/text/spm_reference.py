"""SentencePiece's way to tokenise with a vocabulary of scores, written plainly: the specification of ours."""

from __future__ import annotations

from itertools import pairwise

SPACE = "\u2581"


def spm_encode(text: str, tokens: list[str], scores: list[float], *, prefix: bool) -> list[int]:
    """Merge the neighbours whose whole has the highest score, the leftmost first, until none can be merged; what is
    no token then is its bytes."""
    ids = {token: id for id, token in enumerate(tokens)}
    symbols = list((SPACE if prefix and text else "") + text.replace(" ", SPACE))
    while True:
        wholes = [left + right for left, right in pairwise(symbols)]
        candidates = [(-scores[ids[whole]], at) for at, whole in enumerate(wholes) if whole in ids]
        if not candidates:
            break
        _, at = min(candidates)
        symbols[at : at + 2] = [wholes[at]]
    return [id for symbol in symbols for id in _symbol_ids(symbol, ids)]


def _symbol_ids(symbol: str, ids: dict[str, int]) -> list[int]:
    return [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
