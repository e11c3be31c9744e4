"""The bundled reader's tokens: the generator's words as whole tokens, and bytes for any other text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tools.reader import stories

SPECIALS = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)


def byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def build_tokenizer() -> Tokenizer:
    """A byte-level tokenizer: the generator's words are whole tokens, any other text falls back to its bytes."""
    symbols = byte_symbols()
    words = ["".join(symbols[b] for b in token.encode()) for token in stories.vocabulary()]
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *symbols, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def token_ids() -> dict[str, int]:
    """The ids of `build_tokenizer` by the tokens' text, for the generator's texts, which are ASCII."""
    ids = {chr(b): len(SPECIALS) + b for b in range(128)}
    return ids | {token: len(SPECIALS) + 256 + i for i, token in enumerate(stories.vocabulary())}
