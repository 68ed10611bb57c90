"""Where the files come from that nanochat's guides tell users to fetch."""

from pathlib import Path

SOURCES = {
    "identity_conversations.jsonl": "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl",
    "words_alpha.txt": "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt",
}


def source_hint(path: Path) -> str:
    """The end of a sentence: how to get the known file `path`, nothing for any other."""
    url = SOURCES.get(path.name)
    return f"; to download it: curl -L -o {path} {url}" if url else ""
