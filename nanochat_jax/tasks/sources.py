"""What may help where a file is missing: a name like it, or where nanochat's guides tell users to fetch it."""

import difflib
from pathlib import Path

SOURCES = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    "identity_conversations.jsonl": "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl",
    "words_alpha.txt": "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt",
}


def source_hint(path: Path) -> str:
    """The end of a sentence about the missing file `path`: how to get it where it is a known one, else the file beside
    it whose name is most like it, if there is one."""
    if url := SOURCES.get(path.name):
        return f"; to download it: curl -L -o {path} {url}"
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    alike = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / alike[0]}?" if alike else ""
