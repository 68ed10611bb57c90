"""An HTML document that needs nothing from elsewhere."""

import base64
import hashlib
from pathlib import Path

HERE = Path(__file__).parent


def part(name: str) -> str:
    """A script or a style sheet that lies beside this file."""
    return (HERE / name).read_text(encoding="utf-8")


STYLE = part("page.css")  # of every page


def document(title: str, style: str, body: str, script: str, version: str = "") -> str:
    """A page. Whatever the texts in it hold, the browser runs no script but this one, and asks nobody else for
    anything. title, body: HTML. version: of a page that is served, which may ask for itself again."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    if version:
        policy += "; connect-src 'self'"
    return (
        f"<!doctype html><html lang=en{f' data-version={version}' if version else ''}><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width,initial-scale=1'><meta name=color-scheme content='light dark'>"
        f"<title>{title}</title><style>{style}</style><body>{body}<script>{script}</script>\n"
    )
